"""Attach a criterion at a site and count zeros, without waiting for the device inside a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from sparsity_atlas import kernels
from sparsity_atlas.criteria.base import Criterion, SequenceCriterion, keeps_by_threshold
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.kernels import Masked
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.find import intercept, observe, sites_of
from sparsity_atlas.sparsify.counted_vectors import Slot, slots_of
from sparsity_atlas.sparsify.dense_prompt import sparing
from sparsity_atlas.sparsify.each_expert import Drop, dropping_of_each
from sparsity_atlas.sparsify.expert_counts import ByExpert
from sparsity_atlas.sparsify.step_counts import ByStep
from sparsity_atlas.sparsify.step_masks import left
from sparsity_atlas.sparsify.transfer import stacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sparsity_atlas.criteria.dense_prompt import DensePrompt
    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.sparsify.step import Step
    from sparsity_atlas.terms import Phase, PlaceKey

__all__ = ["Counter", "Drop", "NumericalFailure", "applied", "counted", "dropping", "sparsified"]

Sequences = Callable[["Tensor"], "tuple[Tensor, Phase]"]


class Counter:
    """Counts zeros for each slot and each token, in each forward pass.

    The caller says before a forward pass which of its tokens count (`expect`) and takes the counts
    once a batch (`take`), to weigh and add them up as it sees fit. They stay on the device until then.
    What is counted by expert would be too much to keep for each token, so that is weighed at once.

    Attributes:
        slots: what is counted.
        by_expert: sums by expert, of those slots that have experts.
        by_step: sums by step of denoising, of masks.
        step: of denoising, that the pass in hand belongs to; None: the pass is none of these.
    """

    def __init__(self, slots: list[Slot], *, masked: bool = True) -> None:
        """Count.

        Args:
            slots: what is counted.
            masked: whether a criterion leaves masks there, to be counted by step.
        """
        self.slots = slots
        self.by_expert = ByExpert(slots)
        self.by_step = ByStep(slots if masked else ())
        self.step: Step | None = None
        self._index = {slot.key: i for i, slot in enumerate(slots)}
        self._valid: Tensor | None = None
        self._phase: Phase = "scoring"
        self._next: Tensor | None = None  # how often the next pass's tokens count
        self._zeros: list[list[Tensor | None]] = []  # [passes][slots], each [batch, tokens]
        self._finite: list[list[Tensor | None]] = []
        self._block: tuple[Tensor, Tensor] | None = None  # counts of the pass in hand

    def expect(
        self,
        valid: Tensor,
        phase: Phase = "scoring",
        times: Tensor | None = None,
        *,
        step: Step | None = None,
    ) -> None:
        """Announce a batch and what its first pass is for.

        Later passes of the same batch are generation: they bring one token for each row, which all count.
        A pass over whole sequences is a batch of its own, as each one of denoising is.

        Args:
            valid: of the first pass, bool [batch, tokens], True where a token is no padding.
            phase: of the first pass.
            times: how often each token of it counts by expert, int64 [accounts, batch, tokens], 0 where
                padding is; None: once.
            step: which pass of denoising it is.
        """
        self.step = step
        self.by_step.announce(step, valid)
        if self.by_expert.slots:
            self.by_expert.begin(valid.long()[None] if times is None else times)
        self._next = None
        self._valid = valid
        self._phase = phase
        self._zeros, self._finite = [], []

    def feed(self, times: Tensor) -> None:
        """Announce the next pass of the batch, of one token a row.

        Args:
            times: how often each token counts by expert, int64 [batch]; of a pass that nobody announces,
                each once.
        """
        self._next = times

    def begin_pass(self, *_: object) -> None:
        """A forward pass of the model begins (a hook calls this)."""
        if self._zeros:
            self.by_expert.follow(self._next)
            self._next = None
        self._zeros.append([None] * len(self.slots))
        self._finite.append([None] * len(self.slots))
        self._block = None

    def sequences(self, values: Tensor) -> tuple[Tensor, Phase]:
        """What a pass is: its valid tokens, bool [batch, tokens], and its phase.

        Args:
            values: [batch, tokens, width], of the pass.
        """
        if len(self._zeros) == 1 and self._valid is not None:
            return self._valid, self._phase
        valid = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return valid, "scoring" if self._valid is None else "generation"

    def add(self, vectors: Vectors, zeros: Tensor, finite: Tensor) -> None:
        """Count a slot's zeros.

        Args:
            vectors: what they were counted in.
            zeros: integer, one for each of the vectors, after masking.
            finite: bool, of the same shape, whether a vector is free of NaN and infinities.
        """
        if self._valid is None:  # a forward pass that nobody evaluates, such as a warm-up
            return
        slot = self._index[vectors.key]
        if self.by_expert.slots:
            self.by_expert.add(vectors, zeros, later=len(self._zeros) > 1)
        zeros, finite = vectors.of_tokens(zeros), vectors.of_tokens(finite)
        if zeros.device.type == "cpu":
            # In one block for all slots: kept by itself, each would lie where the pass had a large tensor,
            # which malloc then could not give again, so that memory grew by one for each slot.
            if self._block is None:
                shape = (len(self.slots), *zeros.shape)
                self._block = zeros.new_empty(shape), finite.new_empty(shape)
            kept = self._block[0][slot], self._block[1][slot]
            zeros, finite = kept[0].copy_(zeros), kept[1].copy_(finite)
        self._zeros[-1][slot] = zeros
        self._finite[-1][slot] = finite

    def take(self) -> tuple[Tensor, Tensor]:
        """Zeros of the batch, on the device.

        Returns:
            Of the first pass, int64 [slots, batch, tokens], 0 where padding is; of the later passes
            with their one token a row, int64 [passes - 1, slots, batch].

        Raises:
            NumericalFailure: a vector that counts held NaN or an infinity.
        """
        first, rest, whole = self.take_unseen()
        self.check(whole.tolist())
        return first, rest

    def take_unseen(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `take`, without waiting for the device to see whether the numbers are finite.

        Returns:
            Further, bool [slots] on the device, what `check` wants to see.
        """
        valid, self._valid = self._valid, None
        assert valid is not None, "a batch is announced before it is run"
        # Each [slots, batch, tokens]; what layers on other devices counted comes here now.
        zeros = [stacked(one, valid.device).long() for one in self._zeros]
        finite = [stacked(one, valid.device) for one in self._finite]
        zeros[0] = zeros[0] * valid
        finite[0] = finite[0] | ~valid
        whole = torch.stack([one.flatten(1).all(-1) for one in finite]).all(0)
        first, *later = zeros
        rest = torch.stack(later).squeeze(-1) if later else first.new_zeros(0, *first.shape[:2])
        return first, rest, whole

    def check(self, whole: list[bool]) -> None:
        """See whether each slot's vectors were finite, as `take_unseen` says.

        Raises:
            NumericalFailure: a vector that counts held NaN or an infinity.
        """
        for slot, good in zip(self.slots, whole, strict=True):
            if not good:
                raise NumericalFailure(
                    f"NaN or infinity in '{slot.key.tensor}' of layer {slot.key.layer}"
                )


def scored(values: Tensor) -> tuple[Tensor, Phase]:
    """Whole sequences [batch, tokens, width] that are scored in one pass; see `Counter.sequences`."""
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device), "scoring"


def dropping(criterion: Criterion, level: float, sequences: Sequences = scored) -> Drop:
    """What a bound criterion does at a level, by the fastest path there is; prepared once a width.

    Args:
        criterion: as it is bound to the tensor.
        level: its number.
        sequences: which tokens of [batch, tokens, width] are valid, and their phase; asked where the
            criterion looks at more than one token.

    Raises:
        AtlasError: (when called) a criterion of the user's that returns no mask of the right type.
    """
    if isinstance(criterion, ExpertRules):
        return dropping_of_each(criterion, level, lambda rule: dropping(rule, level, sequences))
    if not keeps_by_threshold(criterion):
        return lambda values, onto, _=None: _by_mask(criterion, values, onto, level, sequences)

    @cache
    def rule(width: int, device: torch.device) -> Threshold:
        return criterion.threshold(level, width).to(device)

    return lambda values, onto, _=None: kernels.masked(
        rule(values.shape[-1], values.device), values, onto
    )


def _by_mask(
    criterion: Criterion, values: Tensor, onto: Tensor, level: float, sequences: Sequences
) -> Masked:
    shape, device = values.shape, values.device
    # Apple's MPS has no float64, which a definition may need.
    seen, written = (one.cpu() if device.type == "mps" else one for one in (values, onto))
    rows, written = (one.reshape(-1, shape[-1]) for one in (seen, written))
    if isinstance(criterion, SequenceCriterion):
        valid, phase = sequences(seen)
        mask = criterion.mask_sequences(seen, valid.to(seen.device), phase, level).view(rows.shape)
    else:
        mask = criterion.mask(rows, level)
    if not (torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == rows.shape):
        found = f"{mask.dtype} {list(mask.shape)}" if torch.is_tensor(mask) else type(mask)
        raise AtlasError(
            f"{type(criterion).__name__}.mask: expected torch.bool {list(rows.shape)}, "
            f"found {found}"
        )
    masked = kernels.by_mask(mask.to(device).view(shape), values, onto)
    replaced = criterion.replace(rows, written, mask, level)
    return masked if replaced is None else masked._replace(out=replaced.to(device).view(shape))


@contextlib.contextmanager
def counted(model: nn.Module, parts: Sequence[Part]) -> Iterator[Counter]:
    """Count exact zeros at every site of an untouched model."""
    counter = Counter(slots_of(parts, None), masked=False)
    # A threshold that drops nothing counts in one pass.
    everything = Threshold("fixed", constants=torch.zeros(1))

    @cache
    def rule(device: torch.device) -> Threshold:
        return everything.to(device)

    def count(vectors: Vectors) -> None:
        values = vectors.values
        found = kernels.masked(rule(values.device), values, values)
        counter.add(vectors, found.zeros, found.finite)

    with _passes(model, counter), observe(parts, sites_of(parts), count):
        yield counter


@contextlib.contextmanager
def sparsified(
    model: nn.Module,
    parts: Sequence[Part],
    site: str,
    criterion: Criterion,
    level: float,
    calibration: Mapping[str, State] | None = None,
    *,
    by_step: bool = True,
) -> Iterator[Counter]:
    """Drop what `criterion` drops at `site` in every layer, and count zeros there.

    A dropped entry counts as a zero also where the criterion puts something in its place.
    `by_step=False`: masks of a generation by denoising are not followed from step to step.
    """
    bound = bind_all(criterion, parts, site, calibration)
    dense = criterion.dense_prompt
    with applied(model, parts, site, bound, level, by_step=by_step, dense=dense) as counter:
        yield counter


@contextlib.contextmanager
def applied(
    model: nn.Module,
    parts: Sequence[Part],
    site: str,
    bound: Mapping[PlaceKey, Criterion],
    level: float,
    *,
    by_step: bool = True,
    dense: DensePrompt | None = None,
) -> Iterator[Counter]:
    """Drop what bound criteria drop at their places of a site, and count zeros there.

    Args:
        model: the model.
        parts: all of its own.
        site: where.
        bound: a criterion by place; a place of the site that is not among them stays dense.
        level: of all of them.
        by_step: see `sparsified`.
        dense: what stays dense of each prompt.
    """
    if any(isinstance(rule, ExpertRules) for rule in bound.values()):
        parts = [part.apart() for part in parts]
    slots = [slot for slot in slots_of(parts, site) if slot.key in bound]
    counter = Counter(slots, masked=by_step)
    drops = {place: dropping(rule, level, counter.sequences) for place, rule in bound.items()}
    if dense is not None:
        drops = {place: sparing(drop, dense, counter.sequences) for place, drop in drops.items()}

    def rewrite(vectors: Vectors, onto: Tensor) -> Tensor | None:
        drop = drops.get(vectors.key)
        if drop is None:
            return None
        found = drop(vectors.values, onto, vectors.spread)
        counter.add(vectors, found.zeros, found.finite)
        if counter.by_step.counts:
            counter.by_step.add(vectors, left(drop, found, vectors, onto))
        return found.out

    with _passes(model, counter), intercept(parts, site, rewrite):
        yield counter


@contextlib.contextmanager
def _passes(model: nn.Module, counter: Counter) -> Iterator[None]:
    handle = model.register_forward_pre_hook(counter.begin_pass)
    try:
        yield
    finally:
        handle.remove()
