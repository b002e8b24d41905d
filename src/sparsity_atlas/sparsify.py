"""Attach a criterion at a site and count zeros, without waiting for the device inside a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparsity_atlas.criteria.base import SequenceCriterion
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.place import bind_all
from sparsity_atlas.sites import TENSORS, intercept, observe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.base import Phase
    from sparsity_atlas.place import State
    from sparsity_atlas.sites import FFN


class NumericalFailure(AtlasError):
    """NaN or an infinity where a model computes; the message names the layer."""


@dataclass(frozen=True)
class Slot:
    """One counted vector: a tensor of one layer."""

    tensor: str
    layer: int
    width: int


class Counter:
    """Counts zeros for each slot and each token, in each forward pass.

    The caller says before a forward pass which of its tokens count (`expect`) and takes the counts
    once a batch (`take`), to weigh and add them up as it sees fit. They stay on the device until then.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self._index = {(slot.tensor, slot.layer): i for i, slot in enumerate(slots)}
        self._valid: Tensor | None = None
        self._generates = False
        self._zeros: list[list[Tensor | None]] = []  # [passes][slots], each [batch, tokens]
        self._broken: list[list[Tensor | None]] = []

    def expect(self, valid: Tensor, *, generates: bool = False) -> None:
        """Announce a batch: bool [batch, tokens], True where a token is no padding.

        Later passes of the same batch (generation) bring one token for each row, which all count.

        Args:
            valid: of the first pass.
            generates: whether later passes follow.
        """
        self._valid = valid
        self._generates = generates
        self._zeros, self._broken = [], []

    def begin_pass(self, *_: object) -> None:
        """A forward pass of the model begins (a hook calls this)."""
        self._zeros.append([None] * len(self.slots))
        self._broken.append([None] * len(self.slots))

    def sequences(self, values: Tensor) -> tuple[Tensor, Phase]:
        """What a pass is: its valid tokens, bool [batch, tokens], and its phase.

        Args:
            values: [batch, tokens, width], of the pass.
        """
        if len(self._zeros) == 1 and self._valid is not None:
            return self._valid, "prompt" if self._generates else "scoring"
        valid = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return valid, "scoring" if self._valid is None else "generation"

    def add(self, tensor_name: str, layer: int, values: Tensor, mask: Tensor | None) -> None:
        """Count a slot's zeros after masking.

        Args:
            tensor_name: which tensor of the layer.
            layer: index of the layer.
            values: [..., width], before masking.
            mask: bool of the same shape, True where kept; None keeps all.
        """
        if self._valid is None:  # a forward pass that nobody evaluates, such as a warm-up
            return
        width = values.shape[-1]
        kept = values != 0 if mask is None else mask & (values != 0)
        zeros = width - kept.reshape(-1, width).sum(-1)  # [tokens of the pass]
        batch = self._valid.shape[0]
        zeros = zeros.view(batch, -1)
        # A NaN or an infinity makes the largest magnitude one as well.
        finite = torch.isfinite(values.detach().abs().amax(-1)).view(batch, -1)
        if len(self._zeros) == 1:
            zeros = zeros * self._valid
            finite = finite | ~self._valid
        slot = self._index[tensor_name, layer]
        self._zeros[-1][slot] = zeros
        self._broken[-1][slot] = ~finite.all()

    def take(self) -> tuple[Tensor, Tensor]:
        """Zeros of the batch, on the device.

        Returns:
            Of the first pass, int64 [slots, batch, tokens], 0 where padding is; of the later passes
            with their one token a row, int64 [passes - 1, slots, batch].

        Raises:
            NumericalFailure: a vector that counts held NaN or an infinity.
        """
        self._valid = None
        broken = torch.stack([torch.stack(one) for one in self._broken]).any(0)
        for slot, bad in zip(self.slots, broken.tolist(), strict=True):
            if bad:
                raise NumericalFailure(f"NaN or infinity in '{slot.tensor}' of layer {slot.layer}")
        first, *later = (torch.stack(one) for one in self._zeros)
        rest = torch.stack(later).squeeze(-1) if later else first.new_zeros(0, *first.shape[:2])
        return first, rest


def exact_mask(criterion: Criterion, rows: Tensor, level: float) -> Tensor:
    """`criterion.mask`, on the CPU where the device has no float64 (Apple's MPS)."""
    if rows.device.type == "mps":
        return criterion.mask(rows.cpu(), level).to(rows.device)
    return criterion.mask(rows, level)


def slots_of(ffns: list[FFN], site: str | None) -> list[Slot]:
    """What is counted at a site (None: at every site), in the order of a forward pass."""
    sites = ffns[0].sites() if site is None else [site]
    tensors = {name for one in sites for name in TENSORS[one]}
    order = [name for name in ("input", "up", "gate", "intermediate") if name in tensors]
    return [
        Slot(name, ffn.layer, ffn.hidden if name == "input" else ffn.width)
        for ffn in ffns
        for name in order
    ]


@contextlib.contextmanager
def counted(model: PreTrainedModel, ffns: list[FFN]) -> Iterator[Counter]:
    """Count exact zeros at every site of an untouched model."""
    counter = Counter(slots_of(ffns, None))
    with (
        _passes(model, counter),
        observe(
            ffns,
            ffns[0].sites(),
            lambda layer, name, values: counter.add(name, layer, values, None),
        ),
    ):
        yield counter


@contextlib.contextmanager
def sparsified(
    model: PreTrainedModel,
    ffns: list[FFN],
    site: str,
    criterion: Criterion,
    level: float,
    calibration: Mapping[str, State] | None = None,
) -> Iterator[Counter]:
    """Drop what `criterion` drops at `site` in every layer, and count zeros there.

    A dropped entry counts as a zero also where the criterion puts something in its place.
    """
    counter = Counter(slots_of(ffns, site))
    bound = bind_all(criterion, ffns, site, calibration)

    def rewrite(layer: int, name: str, values: Tensor, written: Tensor) -> Tensor:
        rule = bound[layer, name]
        rows = values.reshape(-1, values.shape[-1])
        if isinstance(rule, SequenceCriterion):
            valid, phase = counter.sequences(values)
            mask = rule.mask_sequences(values, valid, phase, level).view(rows.shape)
        else:
            mask = exact_mask(rule, rows, level)
        if not (torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == rows.shape):
            found = f"{mask.dtype} {list(mask.shape)}" if torch.is_tensor(mask) else type(mask)
            raise AtlasError(
                f"{type(criterion).__name__}.mask: expected torch.bool {list(rows.shape)}, "
                f"found {found}"
            )
        counter.add(name, layer, values, mask.view(values.shape))
        replaced = replaced_rows(rule, rows, written.reshape(rows.shape), mask, level)
        return replaced.view(written.shape)

    with _passes(model, counter), intercept(ffns, site, rewrite):
        yield counter


def replaced_rows(
    criterion: Criterion, values: Tensor, written: Tensor, mask: Tensor, level: float
) -> Tensor:
    """What becomes of `written` under a mask: see `Criterion.replace`."""
    if values.device.type == "mps":
        replaced = criterion.replace(values.cpu(), written.cpu(), mask.cpu(), level)
    else:
        replaced = criterion.replace(values, written, mask, level)
    return torch.where(mask, written, 0) if replaced is None else replaced.to(written)


@contextlib.contextmanager
def _passes(model: PreTrainedModel, counter: Counter) -> Iterator[None]:
    handle = model.register_forward_pre_hook(counter.begin_pass)
    try:
        yield
    finally:
        handle.remove()
