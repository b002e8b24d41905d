"""Routed experts of one layer, bound to the module that holds them all."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.experts.experts_modules import served
from sparsity_atlas.sites.experts.gating import Gating, bind_gating
from sparsity_atlas.sites.experts.grouping import Grouping
from sparsity_atlas.sites.experts.implementation import Act, Tap, tapped


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """E experts of which each token meets K: E_e(x) = W_d,e (u ⊙ g); ungated: W_d,e σ(W_u,e x).

    Attributes:
        path: of the module.
        module: holds the weights of all experts; one of the experts interface, or as it is shown there.
        count: E.
        each: K.
        hidden: d, entries of x.
        width: w, entries of u, g and u ⊙ g of one expert.
        gating: how u and g come of the first projection; None without a gate.
    """

    path: str
    module: nn.Module = field(repr=False)
    count: int
    each: int
    hidden: int
    width: int
    gating: Gating | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that they have, in the order in which a forward pass makes them."""
        return ("input", "intermediate") if self.gating is None else _GATED

    @property
    def resting(self) -> int:
        """Parameters of the E - K experts that a token does not meet."""
        # What all experts share has no axis for them.
        own = (one.numel() for one in self.module.parameters() if one.shape[:1] == (self.count,))
        return sum(own) // self.count * (self.count - self.each)

    def size(self, tensor: str) -> int:
        """Entries of a tensor for one token, those of its K experts together."""
        return self.hidden if tensor == "input" else self.each * self.width

    def outputs(self, tensor: str) -> int:
        """Weights that each entry meets: of x, those of all K experts of the token."""
        if tensor != "input":
            return self.hidden
        return self.each * (self.width if self.gating is None else 2 * self.width)

    def tap(self, stack: ExitStack, tensor: str, act: Act) -> None:
        """Show a tensor to `act`, which may change it, until the stack is closed.

        Args:
            stack: holds the tap; the model must have the implementation `installed` meanwhile.
            tensor: one of `tensors`, or of the routing.
            act: see `Tap`.
        """
        stack.enter_context(tapped(self.module, self.made_tap(tensor, act)))

    def made_tap(self, tensor: str, act: Act) -> Tap:
        """A tap that nothing is attached to yet; see `tap`."""
        factor = None
        if tensor in ("up", "gate"):
            assert self.gating is not None, "without a gate there are no factors"
            of = self.gating.up if tensor == "up" else self.gating.gate
            function: Any = self.module
            factor = partial(of, function._apply_gate)
        return Tap(tensor, act, factor)

    def nonlinearity(self) -> nn.Module | None:
        """The module that makes g of its argument, where that is all that is done to it."""
        function = getattr(self.module, "act_fn", None)
        if not isinstance(function, nn.Module) or self.gating is None:
            return function
        module: Any = self.module
        arguments = torch.tensor(_ARGUMENTS, device=module.down_proj.device)
        z = arguments.new_zeros(len(_ARGUMENTS), 2 * self.width)
        self.gating.nonlinear.of(z).copy_(arguments[:, None])
        found = self.gating.gate(module._apply_gate, z)[:, 0]
        same = torch.allclose(found, function.forward(arguments), rtol=1e-4, atol=1e-6)
        return function if same else None

    def describe(self) -> dict[str, Any]:
        """As JSON; see `bind_routed`."""
        return {
            "path": self.path,
            "count": self.count,
            "each": self.each,
            "hidden": self.hidden,
            "width": self.width,
            "gating": None if self.gating is None else self.gating.describe(),
        }


# Where a gate is compared with the module that it holds: what is cut or capped lies beyond the middle ones.
_ARGUMENTS = (-1000.0, -60.0, -8.0, -2.0, -0.5, 0.0, 0.5, 2.0, 8.0, 60.0, 1000.0)
_GATED = ("input", "up", "gate", "intermediate")


def bind_routed(entry: dict[str, Any], model: nn.Module) -> RoutedExperts:
    """Bind described experts to a model's module.

    Args:
        entry: `RoutedExperts.describe()`.
        model: that model, perhaps loaded again.
    """
    gating = None if entry["gating"] is None else bind_gating(entry["gating"])
    module = served(model.get_submodule(entry["path"]))
    return RoutedExperts(**(entry | {"gating": gating}), module=module)


def by_token(grouping: Grouping, counts: Tensor) -> Tensor:
    """What was counted of each grouped row [S], by token [N]: added up; of bools, whether all."""
    pairs = grouping.ungrouped(counts)
    return pairs.all(-1) if counts.dtype == torch.bool else pairs.sum(-1, dtype=counts.dtype)
