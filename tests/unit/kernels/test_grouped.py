"""Thresholds of several groups at once: to the bit what each group's own threshold gives of its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import Masked, grouped
from sparsity_atlas.kernels.definition import Threshold

GROUPS, WIDTH = 5, 48
# Of the third group there is no row.
OF_ROW = torch.tensor([0] * 7 + [1] + [3] * 20 + [4] * 5)
LEVELS = (0.0, 0.05, 0.5, 0.9, 1.0)


def drawn(dtype: torch.dtype) -> Tensor:
    """Rows with tails, ties, zeros, nothing but zeros, tiny numbers, NaN and an infinity."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(OF_ROW), WIDTH, generator=generator) ** 3
    values[1] = 0
    values[2, ::3] = 0
    values[3] = values[3].round()
    values[9] *= 1e-38
    values[10, 4] = torch.nan
    values[11, 5] = -torch.inf
    return values.to(dtype)


def weights() -> Tensor:
    found = torch.rand(GROUPS, WIDTH, generator=torch.Generator().manual_seed(1))
    # Columns that meet nothing: their entries are zero scores and no zeros.
    found[0, :30] = 0
    found[3, 5] = 0
    found[4] = 1e-30
    return found


def one_by_one(rules: list[Threshold], values: Tensor, onto: Tensor) -> Masked:
    """Each group's threshold by the definition, over its own rows."""
    found = []
    for number, rule in enumerate(rules):
        own = number == OF_ROW
        found.append(kernels.reference(rule, values[own], onto[own]))
    out, zeros, finite, _ = zip(*found, strict=True)
    return Masked(torch.cat(out), torch.cat(zeros), torch.cat(finite))


def check(rules: list[Threshold], dtype: torch.dtype) -> None:
    together = grouped.joined(rules)
    assert together is not None
    values = drawn(dtype)
    for onto in (values, values.flip(1).nan_to_num(1.0, 2.0, 3.0)):
        wanted = one_by_one(rules, values, onto)
        found = grouped.masked(together, values, onto, OF_ROW)
        assert torch.equal(found.out.nan_to_num(7.0), wanted.out.nan_to_num(7.0))
        assert torch.equal(found.zeros.long(), wanted.zeros.long())
        assert torch.equal(found.finite, wanted.finite)


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rank", "share", "peak"])
def test_weighted(
    kind: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, path)
    for level in LEVELS:
        amount = int(level * WIDTH) if kind == "rank" else level
        check([Threshold(kind, amount, weights=row) for row in weights()], dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
def test_constants(by_channel: bool, weighted: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    constants = torch.rand(GROUPS, WIDTH if by_channel else 1, generator=generator)
    constants[1], constants[3, 0] = 0, torch.inf
    own = list(weights()) if weighted else [None] * GROUPS
    check(
        [
            Threshold("fixed", constants=row, weights=one)
            for row, one in zip(constants, own, strict=True)
        ],
        dtype,
    )


def test_one_for_all() -> None:
    check([Threshold("share", 0.7)] * GROUPS, torch.bfloat16)


def test_constants_of_one_and_of_each_channel() -> None:
    many = [Threshold("fixed", constants=torch.full((WIDTH,), 0.3))] * 2
    check([*many, *[Threshold("fixed", constants=torch.tensor([0.8]))] * 3], torch.float32)


@pytest.mark.parametrize(
    "other",
    [
        Threshold("share", 0.5, weights=torch.ones(WIDTH)),
        Threshold("rank", 4, weights=torch.ones(WIDTH)),
        Threshold("rank", 5),
        Threshold("share", 5, 2.0, weights=torch.ones(WIDTH)),
    ],
)
def test_what_differs_in_more_is_not_joined(other: Threshold) -> None:
    assert grouped.joined([Threshold("rank", 5, weights=torch.ones(WIDTH)), other]) is None
