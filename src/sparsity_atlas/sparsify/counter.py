"""Zeros by token and by place, counted while a model runs, and kept on the device until they are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsity_atlas import kernels
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.sparsify.expert_counts import ByExpert
from sparsity_atlas.sparsify.pass_counts import PassCounts
from sparsity_atlas.sparsify.step_counts import ByStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparsity_atlas.sites.find import Vectors
    from sparsity_atlas.sparsify.step import Step
    from sparsity_atlas.terms import Phase


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
        by_token: whether what is dropped of a token that is generated follows from its own vectors alone.
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
        self.by_token = True
        self._index = {slot.key: i for i, slot in enumerate(slots)}
        self._valid: Tensor | None = None
        self._phase: Phase = "scoring"
        self._next: Tensor | None = None  # how often the next pass's tokens count
        self._passes: list[PassCounts] = []  # of the batch

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
        self._passes = []

    def feed(self, times: Tensor) -> None:
        """Announce the next pass of the batch, of one token a row.

        Args:
            times: how often each token counts by expert, int64 [batch]; of a pass that nobody announces,
                each once.
        """
        self._next = times

    def begin_pass(self, *_: object) -> None:
        """A forward pass of the model begins (a hook calls this)."""
        if self._passes:
            self.by_expert.follow(self._next)
            self._next = None
        self._passes.append(PassCounts(len(self.slots)))

    def sequences(self, values: Tensor) -> tuple[Tensor, Phase]:
        """What a pass is: its valid tokens, bool [batch, tokens], and its phase.

        Args:
            values: [batch, tokens, width], of the pass.
        """
        if len(self._passes) == 1 and self._valid is not None:
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
            self.by_expert.add(vectors, zeros, later=len(self._passes) > 1)
        self._passes[-1].put(slot, vectors.of_tokens(zeros), vectors.of_tokens(finite))

    def add_together(self, vectors: Sequence[Vectors]) -> None:
        """Count the zeros of several slots that no experts have, see `kernels.count_together`.

        Args:
            vectors: of each, [batch, tokens, width], on one device and of one type.
        """
        if self._valid is None:
            return
        slots = [self._index[one.key] for one in vectors]
        tensors = [one.values for one in vectors]
        shape, device = tensors[0].shape[:-1], tensors[0].device
        zeros, finite = self._passes[-1].room(slots, shape, torch.int32, device)
        kernels.count_together(tensors, slots, zeros, finite)

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
        taken = [one.taken(valid.device) for one in self._passes]  # each [slots, batch, tokens]
        zeros, finite = [one.long() for one, _ in taken], [one for _, one in taken]
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
