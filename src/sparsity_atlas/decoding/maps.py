"""A linear map and a gated FFN that leave out the weights which dropped entries meet, for up to 16 tokens.

The masks are those of `kernels`, bit for bit, and the results those of dense products of the masked
vectors, but for the order of their float32 sums. Tokens share what is read: a row of weights is left out
where no token wants it. What the kernels are not made for is computed the dense way.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sparsity_atlas import kernels
from sparsity_atlas.decoding.backend import ACTIVATIONS, Backend, activated, backend_of
from sparsity_atlas.decoding.vector import LIKELY, Keep, Norm, Vector, fused_of, prepared
from sparsity_atlas.terms import TENSORS

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold

# Of a site's tensors, what is likely dropped.
UNKNOWN: Mapping[str, float] = MappingProxyType({})
SITES = ("input", "up", "gate", "intermediate", "all_inputs")


class InputMap:
    """y = W (x ⊙ m) + b, for `input`, `intermediate`, `qkv_input` and `o_input`.

    Rows of a transposed copy are left out, which takes as much memory as the weight.

    Args:
        weight: W [outputs, inputs]; it is kept for the dense way.
        bias: [outputs].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.transposed = self.weight.t().contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weight.dtype

    @property
    def copies(self) -> int:
        """Bytes beside the weights."""
        return self.transposed.nbytes

    def __call__(self, x: Tensor, rule: Threshold | None, expected: float = LIKELY) -> Tensor:
        """The map of a masked vector.

        Args:
            x: [tokens, inputs].
            rule: with its tensors on the device of x; None keeps everything.
            expected: share of the entries that is likely dropped, by which the product is cut.

        Returns:
            [tokens, outputs], of the type of x.
        """
        backend = backend_of(x, self.weight)
        if backend is None or rule is None:
            return F.linear(_masked(rule, x), self.weight, self.bias)
        vector = prepared(rule, x, fused=backend.fuses, expected=expected)
        return backend.by_inputs(vector, self.transposed, self.bias)

    def after_norm(
        self, x: Tensor, norm: Norm, rule: Threshold | None, expected: float = LIKELY
    ) -> tuple[Tensor, Tensor] | None:
        """The map of a masked norm, which is made on the way.

        Args:
            x: [tokens, inputs].
            norm: of it, and of what is added to it.
            rule: as above.
            expected: likewise.

        Returns:
            The sum [tokens, inputs] and what the map makes of its norm; None where that takes two steps.
        """
        backend = backend_of(x, self.weight)
        vector = None if backend is None or rule is None else fused_of(rule, x, expected)
        if backend is None or vector is None:
            return None
        return backend.after_norm(vector, norm, self.transposed, None, self.bias, None)


class GatedFFN:
    """W_d (u ⊙ g) with u = W_u x and g = σ(W_g x), sparsified at one site.

    Transposed copies are made of the maps whose inputs are masked: of W_u and W_g for `input`, of W_d for
    all else.

    Args:
        up: W_u [width, hidden].
        gate: W_g, of the same shape.
        down: W_d [hidden, width].
        activation: σ, one of `ACTIVATIONS`.
        site: one of `SITES`.
    """

    def __init__(self, up: Tensor, gate: Tensor, down: Tensor, activation: str, site: str) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, found '{activation}'")
        if site not in SITES:
            raise ValueError(f"site: expected {', '.join(SITES)}, found '{site}'")
        self.up, self.gate, self.down = (one.detach() for one in (up, gate, down))
        self.activation, self.tensors = activation, TENSORS[site]
        copied = {"up": self.up, "gate": self.gate} if "input" in self.tensors else {}
        if self.tensors != ("input",):
            copied["down"] = self.down
        self.transposed = {name: one.t().contiguous() for name, one in copied.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.down.dtype

    @property
    def copies(self) -> int:
        """Bytes beside the weights."""
        return sum(one.nbytes for one in self.transposed.values())

    def __call__(
        self, x: Tensor, rules: Mapping[str, Threshold], expected: Mapping[str, float] = UNKNOWN
    ) -> Tensor:
        """The FFN's output.

        Args:
            x: [tokens, hidden].
            rules: of each tensor of the site, with their tensors on the device of x.
            expected: of these, the share of entries that is likely dropped, by which products are cut.

        Returns:
            [tokens, hidden], of the type of x.
        """
        if set(rules) != set(self.tensors):
            raise ValueError(f"rules: expected those of {self.tensors}, found {tuple(rules)}")
        backend = backend_of(x, self.up)
        if backend is None:
            return self._dense(x, rules)
        if "input" in rules:
            drops = expected.get("input", LIKELY)
            seen = prepared(rules["input"], x, fused=backend.fuses, expected=drops)
            maps = self.transposed["up"], self.transposed["gate"]
            i = backend.factors_by_inputs(seen, *maps, self.activation)
        elif "intermediate" in rules:
            i = backend.factors(x, self.up, self.gate, self.activation)
        else:
            ((name, rule),) = rules.items()
            i = backend.factors_by_rule(x, self.up, self.gate, self.activation, name, rule)
        return self._lowered(backend, i, rules, expected)

    def after_norm(
        self,
        x: Tensor,
        norm: Norm,
        rules: Mapping[str, Threshold],
        expected: Mapping[str, float] = UNKNOWN,
    ) -> tuple[Tensor, Tensor] | None:
        """The FFN's output of a norm, which is made on the way.

        Args:
            x: [tokens, hidden].
            norm: of it, and of what is added to it.
            rules: as above.
            expected: likewise.

        Returns:
            The sum and the output, [tokens, hidden] each; None where that takes one step more.
        """
        backend, rule = backend_of(x, self.up), rules.get("input")
        drops = expected.get("input", LIKELY)
        vector = None if backend is None or rule is None else fused_of(rule, x, drops)
        if backend is None or vector is None:
            return None
        maps = self.transposed["up"], self.transposed["gate"]
        found = backend.after_norm(vector, norm, *maps, None, self.activation)
        if found is None:
            return None
        total, i = found
        return total, self._lowered(backend, i, rules, expected)

    def _lowered(
        self,
        backend: Backend,
        i: Tensor,
        rules: Mapping[str, Threshold],
        expected: Mapping[str, float],
    ) -> Tensor:
        """W_d of what the factors made, [tokens, width]."""
        if "down" not in self.transposed:
            return F.linear(i, self.down)
        name = self.tensors[-1]
        drops = expected.get(name, LIKELY)
        # What a factor dropped are zeros by now.
        vector = Vector(i, Keep.NONZERO, expected=drops)
        if name == "intermediate":
            vector = prepared(rules[name], i, fused=backend.fuses, expected=drops)
        return backend.by_inputs(vector, self.transposed["down"], None)

    def _dense(self, x: Tensor, rules: Mapping[str, Threshold]) -> Tensor:
        """The same with dense products of masked vectors."""
        x = _masked(rules.get("input"), x)
        u = _masked(rules.get("up"), F.linear(x, self.up))
        g = _masked(rules.get("gate"), activated(F.linear(x, self.gate), self.activation))
        return F.linear(_masked(rules.get("intermediate"), u * g), self.down)


def _masked(rule: Threshold | None, values: Tensor) -> Tensor:
    return values if rule is None else kernels.masked(rule, values, values).out
