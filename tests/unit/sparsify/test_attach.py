"""A criterion at a site: which path runs, each layer's own rule, and what is counted."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.find import SITES, TENSORS, Part, Vectors, find_parts
from sparsity_atlas.sites.part import measure
from sparsity_atlas.sparsify.attach import Counter, counted, sparsified
from sparsity_atlas.sparsify.counted_vectors import Slot
from tiny_models import LAYERS, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return find_parts(tiny_model("llama", initializer_range=0.3))


def run(parts: list[Part], site: str, criterion: Criterion, level: float) -> tuple[Tensor, list]:
    """Logits and counts [slots][batch] of a batch that has one token of padding."""
    ids = token_ids()
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, -1] = False
    with torch.no_grad(), sparsified(parts[0].model, parts, site, criterion, level) as counter:
        counter.expect(valid)
        logits = parts[0].model(ids).logits
        return logits, counter.take()[0].sum(-1).tolist()


def test_counts_lie_in_one_block(parts: list[Part]) -> None:
    """Each by itself would stand where malloc could give a large tensor again."""
    ids = token_ids()
    with torch.no_grad(), counted(parts[0].model, parts) as counter:
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        parts[0].model(ids)
        (kept,) = counter._passes
        assert len(kept._blocks) == 1
        assert len(kept._within) == len(counter.slots)


class Masks(Criterion):
    """A rule that is written as a mask, beside the same as a threshold."""

    dense_level = 1.0
    coarse_levels = ("0.5",)

    def __init__(self, rule: Criterion) -> None:
        self.rule = rule

    def mask(self, values: Tensor, level: float) -> Tensor:
        return self.rule.mask(values, level)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rule", ["topp", "topk", "maxp"])
def test_all_paths_give_the_same_bits(
    parts: list[Part], site: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = create({"rule": rule})
    logits, counts = run(parts, site, criterion, 0.4)
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    for other in (criterion, Masks(criterion)):
        again = run(parts, site, other, 0.4)
        assert torch.equal(again[0], logits)
        assert again[1] == counts
    assert len(counts) == LAYERS * len(TENSORS[site])


def test_what_overrides_a_mask_is_asked_for_it(parts: list[Part]) -> None:
    class Nothing(TopK):
        def mask(self, values: Tensor, level: float) -> Tensor:
            return torch.zeros_like(values, dtype=torch.bool)

    _, counts = run(parts, "intermediate", Nothing(), 1.0)
    width, batch = measure(parts)["width"], token_ids()
    assert counts == [[(batch.shape[1] - (row == 0)) * width for row in range(len(batch))]] * LAYERS


class Layered(Criterion):
    """A constant of its own for each layer and tensor: kept is what reaches it."""

    highest: ClassVar[float] = 9.0
    dense_level = 0.0
    coarse_levels = ("1",)

    def __init__(self, constant: float = 0.0) -> None:
        self.constant = constant

    def bind(self, place: Place, state: dict[str, Tensor]) -> Layered:
        return Layered(torch.inf if (place.layer, place.tensor) == (1, "input") else 0.0)

    def threshold(self, level: float, width: int) -> Threshold:
        return Threshold("fixed", constants=torch.tensor([self.constant]))


def test_each_layer_and_tensor_has_its_own_rule(parts: list[Part]) -> None:
    _, (first, first_i, second, second_i, *_) = run(parts, "all_inputs", Layered(), 1.0)
    assert sum(first) == sum(first_i) == 0
    tokens = token_ids().numel() - 1
    # Without an input there is no intermediate either: exact zeros count.
    assert sum(second) == tokens * measure(parts)["hidden"]
    assert sum(second_i) == tokens * measure(parts)["width"]


def test_a_criterion_says_one_thing_or_the_other(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from sparsity_atlas.criteria import Criterion\n\n\nclass Mine(Criterion):\n"
        "    dense_level = 1.0\n    coarse_levels = ('0.5',)\n"
    )
    with pytest.raises(
        AtlasError, match=r"mine\.py: Mine: expected a method `threshold` or `mask`"
    ):
        create({"file": str(path)})


@pytest.mark.parametrize("padding", [True, False])
def test_padding_neither_counts_nor_breaks(parts: list[Part], padding: bool) -> None:
    part = parts[1]
    x, u = (Vectors(part, name, torch.zeros(2, 2, 8)) for name in ("input", "up"))
    counter = Counter([Slot(x.key, 8, 16), Slot(u.key, 8, 8)])
    counter.expect(torch.tensor([[True, not padding], [True, True]]))
    counter.begin_pass()
    fine = torch.ones(2, 2, dtype=torch.bool)
    counter.add(x, torch.tensor([[1, 2], [3, 4]]), fine)
    counter.add(u, torch.tensor([[5, 6], [7, 8]]), torch.tensor([[True, False], [True, True]]))
    if padding:
        assert counter.take()[0].tolist() == [[[1, 0], [3, 4]], [[5, 0], [7, 8]]]
    else:
        with pytest.raises(NumericalFailure, match="NaN or infinity in 'up' of layer 0"):
            counter.take()
