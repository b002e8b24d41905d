"""A user's criterion that looks beyond its row, or answers what is no mask, is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_parts import find_ffns
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.errors import AtlasError
from tiny_models import tiny_model

HEAD = """
import torch
from sparsity_atlas.criteria.base import Criterion, SequenceCriterion
from sparsity_atlas.kernels.definition import Threshold


class Mine(Criterion):
    highest = 4.0
    dense_level = 0.0
    coarse_levels = ("0.5", "1")
"""
MASK = "\n    def mask(self, values, level):\n"


def mine(folder: Path, text: str) -> dict[str, str]:
    path = folder / "mine.py"
    path.write_text(text)
    return {"file": str(path)}


ACROSS = [
    "values.abs() >= level * values.abs().mean()",
    "values.abs() >= level * values.abs().amax()",
    "values.abs() >= torch.quantile(values.abs(), min(level / 4, 1.0))",
    "values.abs() >= level * values.abs().mean(0)",
    "values.abs() >= level * values[0].abs().mean()",
    "values.abs() >= level * values[-1].abs().mean()",
    "values.abs() >= level * len(values) / 10",
    "(values != 0) | (level < 1) | (values == 0).all(-1).any()",
    "values.abs().cumsum(0) >= level",
    "values.abs().cummax(0).values * level <= values.abs()",
    "values.abs().argsort(0).argsort(0) >= level",
    "(values - values.mean(0)).abs() >= level",
    "values.abs() >= level * values.abs().flatten().sort().values[values.numel() // 2]",
    "values.abs() >= level * values.abs().mean((-2, -1)) if len(values) > 8 else values.abs() >= level",
    "values.abs() >= level * (values.abs().mean() if values.dtype == torch.bfloat16 else 1)",
    "values.abs() >= level * values.abs().amax(0 if values.element_size() < 4 else -1, keepdim=True)",
    "torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) >= level / 4",
]


@pytest.mark.parametrize("rule", ACROSS)
def test_a_rule_that_looks_across_the_batch(tmp_path: Path, rule: str) -> None:
    with pytest.raises(
        AtlasError, match=r"mine\.py: Mine\.mask at level .*: (for|with|among) "
    ) as caught:
        create(mine(tmp_path, HEAD + MASK + f"        return {rule}\n"))
    assert "one row at a time" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_that_does_so_at_one_level(tmp_path: Path) -> None:
    """Which it does not name itself."""
    rule = "values.abs() >= (values.abs().mean() if level == 0.7 else level)"
    criterion = create(mine(tmp_path, HEAD + MASK + f"        return {rule}\n"))
    assert check_level(criterion, "0.6") == 0.6
    with pytest.raises(AtlasError, match=r"mine\.py: Mine\.mask at level 0\.7: for .*one row at a"):
        check_level(criterion, "0.7")


def test_a_threshold_of_no_kind(tmp_path: Path) -> None:
    text = (
        HEAD + "\n    def threshold(self, level, width):\n        return Threshold('mass', level)\n"
    )
    with pytest.raises(AtlasError, match="kind: expected share, rank, peak, fixed, found 'mass'"):
        create(mine(tmp_path, text))


def test_a_rule_that_binds_to_nothing(tmp_path: Path) -> None:
    body = (
        "        return values.abs() >= level\n\n    def bind(self, place, state):\n        pass\n"
    )
    criterion = create(mine(tmp_path, HEAD + MASK + body))
    with pytest.raises(
        AtlasError, match=r"Mine\.bind: expected the criterion for layer 0, .* None"
    ):
        bind_all(criterion, find_ffns(tiny_model("llama")), "intermediate")


@pytest.mark.parametrize(
    "rule",
    [
        "values.abs() >= level * values.abs().mean(-1, keepdim=True)",
        "values.abs() >= level",
        "values.abs() >= torch.quantile(values.abs(), min(level / 4, 1.0), dim=-1, keepdim=True)",
        "values.abs() >= level * torch.arange(values.shape[1]) / 10",
    ],
)
def test_a_rule_that_does_not(tmp_path: Path, rule: str) -> None:
    create(mine(tmp_path, HEAD + MASK + f"        return {rule}\n"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return values.abs()", r"expected torch\.bool \[6, 24\], found torch\.float32 \[6, 24\]"),
        ("return torch.full_like(values, torch.nan)", r"expected torch\.bool"),
        (
            "return (values > level)[:, :-1]",
            r"expected torch\.bool \[6, 24\], found torch\.bool \[6, 23\]",
        ),
        ("return None", "expected torch.bool .*, found <class 'NoneType'>"),
        ("return values.abs_() >= level", "it changes the values that it is given"),
        (
            "return torch.rand_like(values) >= level / 4",
            "the same rows have another mask the second time",
        ),
        ("return values.abs() >= level * values.undefined()", "AttributeError: "),
        ("return values @ values >= level", "RuntimeError: "),
    ],
)
def test_what_is_no_mask(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(
        AtlasError, match=r"mine\.py: Mine\.mask at level [\d.]+: " + message
    ) as caught:
        create(mine(tmp_path, HEAD + MASK + f"        {body}\n"))
    assert "\n" not in str(caught.value)


REPLACE = (
    "        return values.abs() >= level\n\n    def replace(self, values, written, mask, level):\n"
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return written / 0", "NaN or infinity in place of dropped entries"),
        (
            "return written.double()",
            r"expected torch\.float32 \[6, 24\] or None, found torch\.float64",
        ),
    ],
)
def test_what_takes_the_place_of_dropped_entries(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(AtlasError, match=rf"Mine\.replace at level 0: {message}"):
        create(mine(tmp_path, HEAD + MASK + REPLACE + f"        {body}\n"))


SEQUENCES = "\n    def mask_sequences(self, values, valid, phase, level):\n"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "values.abs() >= level * values.abs().mean((1, 2), keepdim=True)",
            "padding must not count",
        ),
        ("values.abs() >= level * values.abs().mean()", "one sequence at a time"),
        (
            "values.abs() >= level * values.abs()[:1].mean(1, keepdim=True)",
            "one sequence at a time",
        ),
        ("values.abs() >= level * values.abs()[:, :1]", None),
        (
            "values.abs() >= level * (values.abs().mean() if values.dtype == torch.bfloat16 else 1)",
            "one sequence at a time",
        ),
    ],
)
def test_a_rule_over_sequences(tmp_path: Path, rule: str, message: str | None) -> None:
    text = HEAD.replace("(Criterion)", "(SequenceCriterion)").replace(
        "import Criterion, SequenceCriterion", "import SequenceCriterion"
    )
    spec = mine(tmp_path, text + SEQUENCES + f"        return {rule}\n")
    if message is None:
        create(spec)
        return
    with pytest.raises(AtlasError, match=rf"mine\.py: Mine\.mask_sequences at level .*{message}"):
        create(spec)


def test_a_rule_that_is_bound_first_is_tried_there(tmp_path: Path) -> None:
    body = """
    def bind(self, place, state):
        self.norms = place.column_norms()
        return self

    def mask(self, values, level):
        return values.abs() * self.norms >= level * values.abs().mean()
"""
    criterion = create(mine(tmp_path, HEAD + body))
    ffns = find_ffns(tiny_model("llama"))
    with torch.no_grad(), pytest.raises(AtlasError, match=r"mine\.py: Mine\.mask at level"):
        bind_all(criterion, ffns, "intermediate")
    criterion = create(mine(tmp_path, HEAD + body.replace(".mean()", ".mean(-1, keepdim=True)")))
    assert len(bind_all(criterion, ffns, "intermediate")) == len(ffns)
