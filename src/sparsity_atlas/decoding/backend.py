"""Which kernels multiply: Triton's on CUDA, Numba's on a CPU, or none."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F

from sparsity_atlas import kernels
from sparsity_atlas.decoding.vector import Norm, Vector, looks_at_entries, prepared

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

_ACTIVATED = {"silu": F.silu, "relu": F.relu}
ACTIVATIONS = tuple(_ACTIVATED)
MOST_TOKENS = 16
_TYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}


def activated(gates: Tensor, activation: str) -> Tensor:
    """σ of W_g x, of its type."""
    return _ACTIVATED[activation](gates)


class Backend(Protocol):
    """Products of one kind of device; all return [tokens, outputs] of the type of what they are given."""

    fuses: ClassVar[bool]
    """Whether a product compares entries with constants itself."""

    def by_inputs(self, vector: Vector, transposed: Tensor, bias: Tensor | None) -> Tensor:
        """W (x ⊙ m) + b from rows of Wᵀ [inputs, outputs]."""

    def factors_by_inputs(
        self, vector: Vector, up: Tensor, gate: Tensor, activation: str
    ) -> Tensor:
        """u ⊙ σ(g) of a masked vector, from rows of W_uᵀ and W_gᵀ."""

    def after_norm(
        self,
        vector: Vector,
        norm: Norm,
        transposed: Tensor,
        second: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
    ) -> tuple[Tensor, Tensor] | None:
        """x + more, and what `by_inputs` or `factors_by_inputs` makes of its masked norm; None: it cannot."""

    def factors(self, x: Tensor, up: Tensor, gate: Tensor, activation: str) -> Tensor:
        """u ⊙ σ(g) of a whole vector."""

    def factors_by_rule(
        self, x: Tensor, up: Tensor, gate: Tensor, activation: str, first: str, rule: Threshold
    ) -> Tensor:
        """u ⊙ σ(g) where a rule looks at one factor, `first`, and of the other only what is kept is
        made."""


class Cuda:
    """Triton's."""

    fuses: ClassVar[bool] = True

    def by_inputs(self, vector: Vector, transposed: Tensor, bias: Tensor | None) -> Tensor:
        """See `Backend`."""
        from sparsity_atlas.decoding import cuda_products

        return cuda_products.by_inputs(vector, transposed, bias=bias)

    def factors_by_inputs(
        self, vector: Vector, up: Tensor, gate: Tensor, activation: str
    ) -> Tensor:
        """See `Backend`: one launch."""
        from sparsity_atlas.decoding import cuda_products

        return cuda_products.by_inputs(vector, up, gate, activation=activation)

    def after_norm(
        self,
        vector: Vector,
        norm: Norm,
        transposed: Tensor,
        second: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
    ) -> tuple[Tensor, Tensor] | None:
        """See `Backend`: one launch, of one token."""
        from sparsity_atlas.decoding import cuda_products

        return cuda_products.after_norm(vector, norm, transposed, second, bias, activation)

    def factors(self, x: Tensor, up: Tensor, gate: Tensor, activation: str) -> Tensor:
        """See `Backend`: one launch."""
        from sparsity_atlas.decoding import cuda_products

        return cuda_products.by_outputs(x, up, gate, activation=activation)

    def factors_by_rule(
        self, x: Tensor, up: Tensor, gate: Tensor, activation: str, first: str, rule: Threshold
    ) -> Tensor:
        """See `Backend`: one launch if the rule looks at entries, else one for each factor and the
        rule's."""
        from sparsity_atlas.decoding import cuda_products

        maps = (gate, up) if first == "gate" else (up, gate)
        if looks_at_entries(rule):
            mask = prepared(rule, x, fused=True)
            return cuda_products.by_outputs(
                x, *maps, activation=activation, decides=first, rule=mask
            )

        def made(factor: Tensor) -> Tensor:
            return cuda_products.by_outputs(x, maps[1], factor=factor)

        return _second(F.linear(x, maps[0]), made, activation, first, rule)


class Cpu:
    """Numba's."""

    fuses: ClassVar[bool] = False

    def by_inputs(self, vector: Vector, transposed: Tensor, bias: Tensor | None) -> Tensor:
        """See `Backend`."""
        from sparsity_atlas.decoding import cpu_products

        made = cpu_products.by_inputs(vector, transposed)
        return (made if bias is None else made + bias.float()).to(transposed.dtype)

    def factors_by_inputs(
        self, vector: Vector, up: Tensor, gate: Tensor, activation: str
    ) -> Tensor:
        """See `Backend`."""
        gates = activated(self.by_inputs(vector, gate, None), activation)
        return self.by_inputs(vector, up, None) * gates

    def after_norm(
        self,
        vector: Vector,
        norm: Norm,
        transposed: Tensor,
        second: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
    ) -> None:
        """See `Backend`."""

    def factors(self, x: Tensor, up: Tensor, gate: Tensor, activation: str) -> Tensor:
        """See `Backend`: torch's own, which reads all of both, too."""
        return F.linear(x, up) * activated(F.linear(x, gate), activation)

    def factors_by_rule(
        self, x: Tensor, up: Tensor, gate: Tensor, activation: str, first: str, rule: Threshold
    ) -> Tensor:
        """See `Backend`."""
        from sparsity_atlas.decoding import cpu_products

        maps = (gate, up) if first == "gate" else (up, gate)

        def made(factor: Tensor) -> Tensor:
            # Rounded before it is multiplied, as torch does.
            return cpu_products.by_outputs(x, maps[1], factor).to(x.dtype) * factor

        return _second(F.linear(x, maps[0]), made, activation, first, rule)


def _second(
    values: Tensor,
    made: Callable[[Tensor], Tensor],
    activation: str,
    first: str,
    rule: Threshold,
) -> Tensor:
    """u ⊙ σ(g) from the first factor's map.

    Args:
        values: of the first factor's map.
        made: f ⊙ (W x) of the other map where f is not zero.
        activation: σ.
        first: whose `values` are.
        rule: that looks at it.
    """
    if first == "gate":
        values = activated(values, activation)
    kept = kernels.masked(rule, values, values).out
    if first == "gate":
        return made(kept)
    gates = made((kept != 0).to(kept.dtype))
    return torch.where(kept != 0, kept * activated(gates, activation), 0)


def backend_of(x: Tensor, weight: Tensor) -> Backend | None:
    """What multiplies these; None where no kernel was made for them."""
    device = x.device.type
    if x.dtype != weight.dtype or x.dtype not in _TYPES.get(device, ()):
        return None
    return _backend(device) if 1 <= len(x) <= MOST_TOKENS else None


@functools.cache
def _backend(device: str) -> Backend | None:
    library = {"cuda": "triton", "cpu": "numba"}[device]
    try:
        if device == "cuda":
            import triton  # noqa: F401
        else:
            import numba  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        return None
    return Cuda() if device == "cuda" else Cpu()
