"""The forward pass of routed experts with taps, given to models by transformers' experts interface.

y(n) = Σ_k r(n, k) · E_e(x(n)), e = index(n, k), E_e(x) = W_d,e (u ⊙ g): pairs of token and expert are
sorted by expert, so that each expert's rows lie together and one grouped product serves all experts. Nobody
sees or changes anything while no tap is attached: the arithmetic is then that of transformers' `grouped_mm`,
its default, to the bit.

https://huggingface.co/docs/transformers/experts_interface
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers.integrations.moe import ExpertsInterface

from sparsity_atlas.sites.experts.experts_modules import experts_modules, interfaced
from sparsity_atlas.sites.experts.grouping import Grouping, group
from sparsity_atlas.sites.experts.scaled_inputs import ScaledInputs, rerouted

NAME = "sparsity_atlas"
# The input once more, a row for each token and each of its experts.
RECEIVED = "received"
# Torch's grouped product steps by whole multiples of these.
_BYTES = 16
_Grouped = Callable[..., Tensor]
Act = Callable[[Grouping, Tensor, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Tap:
    """Somebody who looks at a tensor of the experts, or changes it.

    Attributes:
        tensor: `input` [N, d], before it is handed to the experts; `RECEIVED`, the same as grouped rows
            [S, d]; `index` and `weights` [N, K], the routing; `up`, `gate`, `intermediate`, grouped rows
            [S, w].
        act: called with the pass's grouping, the tensor, and the tensor to write, of the same shape (for
            `up` and `gate` it is `intermediate`); returns what to put there, None for no change. The
            `index` can only be looked at.
        factor: makes `up` or `gate` of what the first projection made [S, 2w].
    """

    tensor: str
    act: Act
    factor: Callable[[Tensor], Tensor] | None = None


_TAPS: WeakKeyDictionary[nn.Module, list[Tap]] = WeakKeyDictionary()


@contextlib.contextmanager
def installed(model: Any) -> Iterator[None]:
    """Have all experts of a model run this implementation; what they ran before comes back.

    Args:
        model: a model of transformers that has experts.
    """
    with chosen(model, NAME):
        yield


@contextlib.contextmanager
def chosen(model: Any, name: str) -> Iterator[None]:
    """Have all experts of a model run a named implementation; what they ran before comes back."""
    with contextlib.ExitStack() as stack:
        every = experts_modules(model).values()
        for module in every:
            if isinstance(module, ScaledInputs) and name == NAME:
                stack.enter_context(rerouted(module, forward))
        if not all(isinstance(module, ScaledInputs) for module in every):
            stack.enter_context(_set(model, name))
        yield


@contextlib.contextmanager
def running(model: Any, module: nn.Module) -> Iterator[None]:
    """Have the experts of one module run this implementation, at least; see `installed`."""
    own = rerouted(module, forward) if isinstance(module, ScaledInputs) else _set(model, NAME)
    with own:
        yield


@contextlib.contextmanager
def _set(model: Any, name: str) -> Iterator[None]:
    ExpertsInterface.register(NAME, forward)
    before = model.get_experts_implementation()
    if set(before.values()) == {name}:
        yield
        return
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def run_whatever_their_shapes(model: Any) -> None:
    """Have a model's experts run their class's own loop where torch's grouped product does not take them.

    Transformers' default is that product, which wants rows of whole 16 bytes, and fails else.

    Args:
        model: of transformers.
    """
    odd = any(
        size * weight.element_size() % _BYTES
        for module in interfaced(model).values()
        for weight in module.parameters(recurse=False)
        if weight.dim() == 3
        for size in weight.shape[1:]
    )
    if odd and "grouped_mm" in model.get_experts_implementation().values():
        model.set_experts_implementation("eager")


@contextlib.contextmanager
def tapped(module: nn.Module, tap: Tap) -> Iterator[None]:
    """Attach a tap to one experts module, whose model has `installed` this implementation."""
    taps = _TAPS.setdefault(_own(module), [])
    taps.append(tap)
    try:
        yield
    finally:
        taps.remove(tap)


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module computes; the names are those of the interface.

    Args:
        self: the experts module.
        hidden_states: [N, d], tokens of all sequences, one behind the other.
        top_k_index: int [N, K], the experts of each token.
        top_k_weights: [N, K], how much each of them counts.

    Returns:
        [N, d].
    """
    return compute(self, hidden_states, top_k_index, top_k_weights, _TAPS.get(_own(self), ()))


def _own(module: nn.Module) -> nn.Module:
    """The model's own module: what it is shown as, where it goes past the interface, is made at need."""
    own: nn.Module = module.own if isinstance(module, ScaledInputs) else module
    return own


def compute(self: Any, x: Tensor, index: Tensor, weights: Tensor, taps: Sequence[Tap]) -> Tensor:
    """As `forward`, with these taps alone."""
    grouping = group(index, self.num_experts)
    _through(taps, "index", grouping, index)
    weights = _through(taps, "weights", grouping, weights)
    i = products(self, x, grouping, taps)
    y = _linear(self, "down_proj", i, grouping)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * weights.reshape(-1)[grouping.order].unsqueeze(-1)
    return grouping.ungrouped(y).sum(dim=1).to(x.dtype)


def products(self: Any, x: Tensor, grouping: Grouping, taps: Sequence[Tap]) -> Tensor:
    """What the down projections read: u ⊙ g of each grouped row [S, w], of x [N, d]."""
    rows = _through(taps, "input", grouping, x)[grouping.tokens]
    rows = _through(taps, RECEIVED, grouping, rows)
    z = _linear(self, "gate_up_proj" if self.has_gate else "up_proj", rows, grouping)
    # Before the product is made: nothing promises that making it leaves z as it is.
    factors = [
        (tap, tap.factor(z))
        for name in ("up", "gate")
        for tap in taps
        if tap.factor is not None and tap.tensor == name
    ]
    i = self._apply_gate(z) if self.has_gate else self.act_fn(z)
    for tap, factor in factors:
        changed = tap.act(grouping, factor, i)
        i = i if changed is None else changed
    return _through(taps, "intermediate", grouping, i)


def _through(taps: Sequence[Tap], tensor: str, grouping: Grouping, out: Tensor) -> Tensor:
    """A tensor past its taps."""
    for tap in taps:
        if tap.tensor == tensor:
            changed = tap.act(grouping, out, out)
            out = out if changed is None else changed
    return out


def _linear(self: Any, name: str, x: Tensor, grouping: Grouping) -> Tensor:
    """Each expert's projection of its rows: [S, in] to [S, out]."""
    weight = getattr(self, name)
    if not self.is_transposed:
        weight = weight.transpose(-2, -1)  # [E, in, out]
    product = grouped_product(x.to(weight.dtype), weight, grouping.offsets)
    if self.has_bias:
        product.add_(getattr(self, f"{name}_bias")[grouping.experts])
    return product


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows @ weight[e] for the rows of each expert e.

    Args:
        rows: [S, in], sorted by expert.
        weight: [E, in, out].
        offsets: int32 [E], where each expert's rows end.

    Returns:
        [S, out], by one grouped product where torch has it for these numbers, else expert by expert.
    """
    if _has_grouped_product(rows, weight):
        grouped: _Grouped = F.grouped_mm
        return grouped(rows, weight, offs=offsets)
    out = rows.new_zeros(rows.shape[0], weight.shape[-1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if start < end:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def _has_grouped_product(rows: Tensor, weight: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: new torch, a short float type, strides of whole 16 bytes."""
    if not hasattr(F, "grouped_mm"):
        return False
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if rows.device.type == "cuda":
        if torch.cuda.get_device_capability(rows.device) < (8, 0):
            return False
    elif rows.device.type != "cpu":
        return False
    elif torch.__version__ < TorchVersion("2.11") and (rows.data_ptr() | weight.data_ptr()) % 16:
        # Older ones also want addresses aligned, which those of mapped files are not.
        return False
    steps = [step for one in (rows, weight) for step in one.stride() if step != 1]
    return all(step * rows.element_size() % _BYTES == 0 for step in steps)
