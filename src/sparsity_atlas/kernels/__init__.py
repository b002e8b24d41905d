"""Fast paths of the thresholds: one read, one write, zeros counted on the way, no wait for the device.

Start with `definition`, which every path gives bit for bit. Which path is taken is decided by what there
is: Triton for CUDA, Numba for the CPU, else the definition in torch. `SPARSITY_ATLAS_KERNELS` in the
environment forces one: `auto`, `reference` (the definition) or `compiled` (fail if there is no kernel).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

    # Rule, values and onto to out, zeros and finite.
    _Kernel = Callable[[Threshold, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | "Masked"]
    _Counting = Callable[[Sequence[Tensor], Sequence[int], Tensor, Tensor], None]

VARIABLE = "SPARSITY_ATLAS_KERNELS"
CHOICES = ("auto", "reference", "compiled")
_LIBRARIES = {"cuda": "triton", "cpu": "numba"}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beyond, the kernels' bounds on the error of their sums do not hold.
LARGEST_WIDTH = 1 << 17


class Masked(NamedTuple):
    """What masking left, and what was counted on the way.

    Attributes:
        out: the tensor with what is dropped set to zero.
        zeros: integer, one for each row: zeros at the site.
        finite: bool, one for each row: no NaN and no infinity at the site, or among its scores.
        mask: bool, of the shape of `out`, True where kept; None where it was not made.
    """

    out: Tensor
    zeros: Tensor
    finite: Tensor
    mask: Tensor | None = None


class Masks(Protocol):
    """What `cpu_masks` and `cuda_masks` have, for tensors [rows, width]."""

    def applied(self, mask: Tensor, values: Tensor, onto: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`out`, `zeros` and `finite` of `by_mask`."""

    def largest_of_groups(self, values: Tensor, size: int, kept: int) -> Tensor:
        """As in `patterns`."""

    def drawn(self, values: Tensor, codes: Tensor, bound: int) -> Tensor:
        """The draws of `patterns` that lie below bound / 2^53."""


def masked(rule: Threshold, values: Tensor, onto: Tensor) -> Masked:
    """Zero in `onto` what the rule drops of `values`.

    Args:
        rule: with its tensors on the device of `values`.
        values: [..., width], what the rule looks at, and whose zeros are counted.
        onto: of the same shape and type, what is to be masked; often `values` itself. It is not changed.

    Returns:
        `out` of the shape of `onto`, which keeps every bit of what is kept; `zeros` and `finite` of the
        shape without the width.

    Raises:
        AtlasError: `compiled` is forced and there is no kernel for this device or type.
    """
    shape = values.shape
    rows = values.reshape(-1, shape[-1])
    written = rows if onto is values else onto.reshape(-1, shape[-1])
    apply = _path(values.device.type, values.dtype, shape[-1] <= LARGEST_WIDTH, _choice())
    out, zeros, finite = apply(rule, rows, written)[:3]
    return Masked(out.view(shape), zeros.view(shape[:-1]), finite.view(shape[:-1]))


def kept_of(rule: Threshold, values: Tensor) -> Tensor:
    """Which entries a rule keeps of values [..., width]: bool of their shape."""
    # What is kept of ones: of the values, a zero may be one of them or dropped.
    ones = values.new_ones(values.shape[-1:]).expand(values.shape)
    return masked(rule, values, ones).out.bool()


def totals(device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The kernel that reads logits on a kind of device, `cuda_likely.totals`; None where there is none."""
    if device != "cuda" or _choice() == "reference":
        return None
    try:
        from sparsity_atlas.kernels import cuda_likely
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return cuda_likely.totals


def counts_together(values: Tensor) -> bool:
    """Whether `count_together` counts such values: where a launch costs more than what it does."""
    return values.dtype in _TYPES and _zeros_on(values.device.type, _choice()) is not None


def count_together(
    tensors: Sequence[Tensor], places: Sequence[int], zeros: Tensor, finite: Tensor
) -> None:
    """Count the zeros of each row of several tensors, as `masked` does with a rule that drops nothing.

    Args:
        tensors: [..., width], `counts_together`; of one type, on one device, with as many rows each.
        places: of each tensor, which of `zeros` and `finite` its counts become.
        zeros: int32 [places, ...], in one piece, written to.
        finite: bool of the same shape, in one piece: no NaN and no infinity.
    """
    count = _zeros_on(tensors[0].device.type, _choice())
    assert count is not None, "asked before"
    count([one.reshape(-1, one.shape[-1]) for one in tensors], places, zeros, finite)


@functools.cache
def _zeros_on(device: str, choice: str) -> _Counting | None:
    if device != "cuda" or choice == "reference":
        return None
    try:
        from sparsity_atlas.kernels import cuda_zeros
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return cuda_zeros.count


def by_mask(mask: Tensor, values: Tensor, onto: Tensor) -> Masked:
    """As `masked`, with a mask (bool of the values' shape, True where kept) in place of a rule."""
    module = masks_of(values)
    if module is None or onto.dtype != values.dtype:
        zeros = (~mask | (values == 0)).sum(-1)
        return Masked(torch.where(mask, onto, 0), zeros, finite(values), mask)
    shape = values.shape
    rows = (one.reshape(-1, shape[-1]) for one in (mask, values, onto))
    out, zeros, whole = module.applied(*rows)
    return Masked(out.view(shape), zeros.view(shape[:-1]), whole.view(shape[:-1]), mask)


def masks_of(values: Tensor) -> Masks | None:
    """The module that works with masks of such values, `cpu_masks` or `cuda_masks`; None where torch does."""
    choice = _choice()
    if choice == "reference" or values.dtype not in _TYPES or values.shape[-1] == 0:
        return None
    return _masks_on(values.device.type)


def finite(values: Tensor) -> Tensor:
    """Whether each row is free of NaN and infinities: bool of the shape without the width."""
    # A NaN or an infinity makes the largest magnitude one as well.
    return torch.isfinite(values.abs().amax(-1))


def reference(rule: Threshold, values: Tensor, onto: Tensor) -> Masked:
    """`masked` by the definition, for tensors [rows, width]."""
    seen = values
    if values.device.type == "mps":  # which has no float64
        seen, rule = values.cpu(), rule.to(torch.device("cpu"))
    found = by_mask(rule.mask(seen).to(values.device), values, onto)
    return found._replace(finite=finite(rule.scores(seen)).to(values.device))


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise AtlasError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}, found '{choice}'")
    return choice


@functools.cache
def _path(device: str, dtype: torch.dtype, narrow: bool, choice: str) -> _Kernel:
    """The path for a kind of device and type; it is logged when it is chosen, which is once."""
    missing = f"none for {dtype} on {device}"
    if not narrow:
        missing = f"none for rows of more than {LARGEST_WIDTH:,} entries"
    if choice != "reference" and device in _LIBRARIES and dtype in _TYPES and narrow:
        try:
            path = _compiled(device)
        except ModuleNotFoundError as error:
            if error.name != _LIBRARIES[device]:
                raise
            missing = f"{error.name} is not installed"
        else:
            cli.logger.info("kernels: compiled (%s)", _LIBRARIES[device])
            return path
    if choice == "compiled":
        raise AtlasError(f"{VARIABLE}: compiled: no kernel ({missing}); use auto or reference")
    cli.logger.info("kernels: reference (%s)", "forced" if choice == "reference" else missing)
    return reference


@functools.cache
def _masks_on(device: str) -> Masks | None:
    if device not in _LIBRARIES:
        return None
    try:
        # Plain imports, by which an edit of either is seen: see `code_version`.
        if device == "cuda":
            from sparsity_atlas.kernels import cuda_masks

            return cuda_masks
        from sparsity_atlas.kernels import cpu_masks
    except ModuleNotFoundError as error:
        if error.name != _LIBRARIES[device]:
            raise
        return None
    return cpu_masks


def _compiled(device: str) -> _Kernel:
    if device == "cuda":
        from sparsity_atlas.kernels import cuda

        return cuda.masked
    from sparsity_atlas.kernels import cpu

    return cpu.masked
