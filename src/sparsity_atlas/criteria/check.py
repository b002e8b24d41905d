"""A user's criterion, tried before anything is measured: masks of one row at a time, the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparsity_atlas.criteria.base import Criterion, SequenceCriterion
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import Phase

# Entries of a row where no tensor of a model is at hand.
WIDTH = 24
# What somebody's code may raise that is no interruption and no fault of the machine.
_RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
_WHY = "it must look at one {0} at a time, or results depend on batch size and padding"


def check_masks(
    criterion: Criterion,
    file: str,
    width: int,
    device: torch.device,
    levels: Sequence[float] | None = None,
) -> None:
    """Try a criterion on rows of every kind, together, alone and in another order.

    In float32, and in bfloat16 where it takes that: it may go another way there.

    Args:
        criterion: as it is bound to a tensor, where it needs that.
        file: that it stands in.
        width: entries of a row.
        device: where masks are made.
        levels: to try it at; unset: those that it names itself.

    Raises:
        AtlasError: it raises an error, its mask is no bool of the shape of the values, it changes these, puts
            something in their place that is no number, or decides about a row by others.
    """
    trial = _Trial(criterion, file)
    for level in _levels(criterion) if levels is None else levels:
        rows = _rows(width, device)
        if isinstance(criterion, SequenceCriterion):
            _check_sequences(trial, level, rows)
        else:
            trial.replaced(rows, _check_rows(trial, level, rows), level)
        if trial.takes(level, rows.bfloat16()):
            check = _check_sequences if isinstance(criterion, SequenceCriterion) else _check_rows
            check(trial, level, rows.bfloat16())


def _levels(criterion: Criterion) -> list[float]:
    ends = (criterion.lowest, criterion.highest)
    return sorted({*map(float, criterion.coarse_levels), *map(float, ends)})


def _rows(width: int, device: torch.device) -> Tensor:
    """[rows, width]: spread, large, small, tied, with zeros, and of nothing else."""
    normal = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1.0], [100.0], [0.01], [1.0], [1.0], [0.0]])
    rows = normal * scale
    rows[3] = (2 * rows[3]).round()
    rows[4] = rows[4].clamp(min=0)
    return rows.to(device)


class _Trial:
    """Asks a criterion, and says what is wrong with an answer."""

    def __init__(self, criterion: Criterion, file: str) -> None:
        self.criterion = criterion
        self._file = file

    def wrong(self, method: str, level: float, what: str) -> AtlasError:
        """The error that says so."""
        name = type(self.criterion).__name__
        return AtlasError(f"{self._file}: {name}.{method} at level {level:g}: {what}")

    def ask(self, method: str, level: float, values: Tensor, *between: object) -> Tensor:
        """A mask, which is bool, of the shape of the values, and has left these alone."""
        given = values.clone()
        try:
            mask = getattr(self.criterion, method)(given, *between, level)
        except _RAISED as error:
            raise self.wrong(method, level, f"{type(error).__name__}: {error}") from None
        shape = list(values.shape)
        if not (torch.is_tensor(mask) and mask.dtype == torch.bool and list(mask.shape) == shape):
            found = f"{mask.dtype} {list(mask.shape)}" if torch.is_tensor(mask) else type(mask)
            raise self.wrong(method, level, f"expected torch.bool {shape}, found {found}")
        if not torch.equal(given, values):
            raise self.wrong(method, level, "it changes the values that it is given")
        return mask

    def takes(self, level: float, values: Tensor) -> bool:
        """Whether a criterion can be asked for values of their type: many a function knows float32 alone."""
        try:
            if isinstance(self.criterion, SequenceCriterion):
                valid = torch.ones(1, len(values), dtype=torch.bool, device=values.device)
                self.criterion.mask_sequences(values[None], valid, "scoring", level)
            else:
                self.criterion.mask(values.clone(), level)
        except _RAISED:
            return False
        return True

    def replaced(self, values: Tensor, mask: Tensor, level: float) -> None:
        """What takes the place of dropped entries is as many numbers of the same type."""
        try:
            found = self.criterion.replace(values.clone(), values.clone(), mask, level)
        except _RAISED as error:
            raise self.wrong("replace", level, f"{type(error).__name__}: {error}") from None
        if found is None:
            return
        like = f"{values.dtype} {list(values.shape)}"
        if not torch.is_tensor(found) or f"{found.dtype} {list(found.shape)}" != like:
            seen = f"{found.dtype} {list(found.shape)}" if torch.is_tensor(found) else type(found)
            raise self.wrong("replace", level, f"expected {like} or None, found {seen}")
        if not torch.isfinite(found).all():
            raise self.wrong("replace", level, "NaN or infinity in place of dropped entries")


def _check_rows(trial: _Trial, level: float, rows: Tensor) -> Tensor:
    """The mask of some rows, which is theirs in any company."""
    whole = trial.ask("mask", level, rows)
    if not torch.equal(trial.ask("mask", level, rows), whole):
        raise trial.wrong("mask", level, "the same rows have another mask the second time")
    for what, some, wanted in _others(rows, whole):
        found = trial.ask("mask", level, some)[: len(wanted)]
        if not torch.equal(found, wanted):
            count = int((found != wanted).sum())
            raise trial.wrong(
                "mask",
                level,
                f"{what}, {count} of {wanted.numel()} entries are decided otherwise; "
                + _WHY.format("row"),
            )
    return whole


def _others(rows: Tensor, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same rows in other company, and the mask that they had."""
    for row in range(len(rows)):
        yield "for a row by itself", rows[row : row + 1], whole[row : row + 1]
    yield "for two rows of six", rows[:2], whole[:2]
    yield "for the rows in reverse", rows.flip(0), whole.flip(0)
    yield (
        "among forty others",
        torch.cat([rows, *(rows.roll(k, 0) * k for k in range(2, 9))]),
        whole,
    )
    yield "with rows of padding behind", torch.cat([rows, 0 * rows[:2]]), whole


def _check_sequences(trial: _Trial, level: float, rows: Tensor) -> None:
    """Across sequences only: along one a mask may follow from what came before."""
    # Three sequences of six tokens.
    batch = torch.stack([rows, rows.flip(0), rows.roll(2, 0) * 3])
    valid = torch.ones(batch.shape[:2], dtype=torch.bool, device=rows.device)
    passes: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
        "scoring": lambda values, valid: [_pass(trial, level, values, valid, "scoring")],
        "denoising": lambda values, valid: [_pass(trial, level, values, valid, "denoising")],
        "generation": lambda values, valid: [
            _pass(trial, level, values, valid, "prompt"),
            _pass(trial, level, values[:, :1], valid[:, :1], "generation"),
        ],
    }
    for phase, run in passes.items():
        whole = run(batch, valid)
        company = [
            *((f"for sequence {k} by itself", [k]) for k in range(len(batch))),
            ("for the sequences in reverse", [2, 1, 0]),
        ]
        for what, order in company:
            found = run(batch[order], valid[order])
            if not all(torch.equal(a, b[order]) for a, b in zip(found, whole, strict=True)):
                raise trial.wrong(
                    "mask_sequences", level, f"{what}, {phase} differs; " + _WHY.format("sequence")
                )
    padded = torch.cat([batch, 0 * batch[:, :2]], 1)
    counted = torch.cat([valid, ~valid[:, :2]], 1)
    before = _pass(trial, level, padded, counted, "scoring")[:, : batch.shape[1]]
    if not torch.equal(before, _pass(trial, level, batch, valid, "scoring")):
        raise trial.wrong(
            "mask_sequences", level, "with padding behind, scoring differs; padding must not count"
        )


def _pass(trial: _Trial, level: float, values: Tensor, valid: Tensor, phase: Phase) -> Tensor:
    return trial.ask("mask_sequences", level, values, valid, phase).clone()
