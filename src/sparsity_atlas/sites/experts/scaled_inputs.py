"""Experts that every token's input is laid out for, scaled by the router: Llama 4's form, seen as any other.

Such a module goes past the experts interface. It is called with E blocks of N rows [E · N, d], the tokens'
inputs times the router's scores, zeros where a token does not go, and multiplies all of them. It has no
biases, so that it makes zeros of zeros: each token's one row that is not zero is what counts, and an expert
whose input is that row, with the weight 1, makes the same. Where a token met several experts, each would read
another multiple of its input, and no tensor would be the input of all: that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.module_hooks import find_tensor, replace_tensor

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""The interface's function: of a module, x [N, d], index [N, K] and weights [N, K]."""
Sent = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_REROUTED: WeakSet[nn.Module] = WeakSet()


def has_scaled_inputs(module: nn.Module) -> bool:
    """Whether a module seems to be of this form: one tensor goes in, and all it holds is two maps an expert.

    Whether it computes what it then should is for numbers to say.
    """
    own = dict(module.named_parameters()) if hasattr(module, "gate_up_proj") else {}
    shapes = {name: tuple(one.shape) for name, one in own.items()}
    if set(shapes) != {"gate_up_proj", "down_proj"} or len(shapes["down_proj"]) != 3:
        return False
    experts, width, hidden = shapes["down_proj"]
    function = getattr(module, "act_fn", None)
    return (
        isinstance(function, nn.Module)
        and shapes["gate_up_proj"] == (experts, hidden, 2 * width)
        and len(signature(module.forward).parameters) == 1
    )


class ScaledInputs(nn.Module):
    """A module of this form with what the interface's modules have.

    Attributes:
        own: the module.
    """

    is_transposed, has_gate = True, True
    has_bias = has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own: Any = own
        self.training = own.training

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.own.down_proj.shape[0])

    @property
    def gate_up_proj(self) -> Tensor:
        """[E, d, 2w]."""
        weight: Tensor = self.own.gate_up_proj
        return weight

    @property
    def down_proj(self) -> Tensor:
        """[E, w, d]."""
        weight: Tensor = self.own.down_proj
        return weight

    def _apply_gate(self, z: Tensor) -> Tensor:
        """U ⊙ g [S, w] of z [S, 2w]."""
        gate, up = z.chunk(2, dim=-1)
        product: Tensor = up * self.own.act_fn(gate)
        return product

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the module's own forward makes of x [N, d], each token in its experts: [N, d]."""
        made = self.own.forward(laid_out(x, index, self.num_experts))
        # Of the rows of zeros, too: they must make none.
        each = x.new_ones(len(x), self.num_experts).scatter(1, index, weights.to(x.dtype))
        total: Tensor = (made.unflatten(0, (self.num_experts, -1)) * each.T[..., None]).sum(0)
        return total


def laid_out(x: Tensor, index: Tensor, experts: int) -> Tensor:
    """x [N, d] as such a module reads it: [experts · N, d], zeros where a token does not go."""
    goes = torch.zeros(len(x), experts, dtype=torch.bool, device=x.device).scatter(1, index, True)
    return torch.where(goes.T[..., None], x, 0).flatten(0, 1)


def taken(rows: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The rows that count.

    Args:
        rows: [experts · N, d].
        experts: E.

    Returns:
        [N, d], and the expert of each, int64 [N, 1].
    """
    blocks = rows.unflatten(0, (experts, -1))
    index = _sizes(blocks).argmax(0)
    return blocks[index, torch.arange(len(index), device=rows.device)], index[:, None]


def _sizes(blocks: Tensor) -> Tensor:
    # Of NaN it is NaN, which counts as the largest.
    sizes: Tensor = torch.linalg.vector_norm(blocks, float("inf"), dim=-1)
    return sizes


@contextmanager
def meets_one(module: ScaledInputs, path: str) -> Iterator[None]:
    """Refuse what is called with more than one row of a token that is not zero.

    Raises:
        AtlasError: (from a forward pass) says so.
    """

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where = find_tensor(args, kwargs, path)
        rows = args[where] if isinstance(where, int) else kwargs[where]
        experts = module.num_experts
        if rows.dim() != 2 or len(rows) % experts:
            raise AtlasError(
                f"{path}: found a tensor of shape {list(rows.shape)}, expected rows for each of its "
                f"{experts} experts"
            )
        most = int((_sizes(rows.unflatten(0, (experts, -1))) != 0).sum(0).max())
        if most > 1:
            raise AtlasError(
                f"{path}: a token goes to {most} experts, each of which reads another multiple of its input: "
                "of experts whose inputs are scaled, one for each token is supported"
            )

    handle = module.own.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rerouted(module: ScaledInputs, forward: Forward) -> Iterator[None]:
    """Have the interface's function give a module's output; where it does already, nothing changes."""
    own = module.own
    if own in _REROUTED:
        yield
        return
    held: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where = find_tensor(args, kwargs, type(own).__name__)
        rows = args[where] if isinstance(where, int) else kwargs[where]
        held[:] = [rows]
        # What it makes itself is not used: of a row of zeros for each expert it costs next to nothing.
        return replace_tensor(
            args, kwargs, where, rows.new_zeros(module.num_experts, rows.shape[-1])
        )

    def leave(*_: Any) -> Tensor:
        rows = held.pop()
        x, index = taken(rows, module.num_experts)
        made = forward(module, x, index, x.new_ones(index.shape))
        return laid_out(made, index, module.num_experts)

    with ExitStack() as stack:
        _REROUTED.add(own)
        stack.callback(_REROUTED.discard, own)
        for handle in (
            own.register_forward_pre_hook(enter, with_kwargs=True),
            own.register_forward_hook(leave),
        ):
            stack.callback(handle.remove)
        yield


def sent(rows: Tensor, experts: int, change: Sent) -> Tensor:
    """Rows [experts · N, d] after the routing, as an interface's module would get it, is changed."""
    x, index = taken(rows, experts)
    index, _ = change(index, x.new_ones(index.shape))
    return laid_out(x, index, experts)
