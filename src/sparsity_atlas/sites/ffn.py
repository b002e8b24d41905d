"""One layer's FFN, bound to the modules that compute its factors and its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.attention import Attention, bind_attention
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import ATTENTION_SITES, FFN_SITES

# Those that the search tries, commonest first: of several names of one function only one.
ACTIVATIONS = (
    *("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "quick_gelu", "sigmoid"),
    *("gelu_fast", "tanh", "mish", "relu6", "leaky_relu", "hardswish", "gelu_10", "laplace"),
    *("sqrtsoftplus", "elu", "selu", "softplus", "softsign", "hardsigmoid"),
)
# Of transformers' table: functions with weights, which no name alone can give.
WITH_WEIGHTS = ("prelu", "xielu")


@dataclass(frozen=True)
class Activation:
    """The nonlinearity σ: a module of the model (`path`), or a function of `ACTIVATIONS`."""

    name: str
    function: Callable[[Tensor], Tensor]
    path: str | None = None
    module: nn.Module | None = None
    """The module whose output is g: none for a function, or where several layers share it."""


@dataclass(frozen=True, eq=False)
class FFN:
    """One layer's FFN(x) = W_d(u ⊙ g) with u = W_u x, g = σ(W_g x); ungated: W_d σ(W_u x)."""

    layer: int
    hidden: int
    width: int
    up: Projection
    gate: Projection | None
    activation: Activation
    down: Projection
    model: nn.Module = field(repr=False)
    overwritten: bool = False
    """The model computes in place: u or g are gone when the down projection runs."""
    attention: Attention | None = None
    """The layer's other linear maps, if they are an attention's."""

    @property
    def gated(self) -> bool:
        """Whether there are two factors."""
        return self.gate is not None

    def sites(self) -> tuple[str, ...]:
        """The sites that this FFN, and its layer, has."""
        own = FFN_SITES if self.gated else ("input", "intermediate", "all_inputs")
        return own if self.attention is None else (*own, *ATTENTION_SITES)

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """The maps that read a tensor, or, of `up` and `gate`, what is made of it: W_d."""
        if self.attention is not None and tensor == "qkv_input":
            return self.attention.qkv
        if self.attention is not None and tensor == "o_input":
            return (self.attention.o,)
        if tensor != "input":
            return (self.down,)
        return (self.up,) if self.gate is None else (self.up, self.gate)

    def size(self, tensor: str) -> int:
        """Entries of a tensor."""
        if self.attention is not None and tensor in ("qkv_input", "o_input"):
            return self.attention.hidden if tensor == "qkv_input" else self.attention.width
        return self.hidden if tensor == "input" else self.width

    def outputs(self, tensor: str) -> int:
        """Entries that the readers make: the weights that each entry of the tensor meets."""
        if self.attention is not None and tensor in ("qkv_input", "o_input"):
            made = self.attention
            return made.outputs if tensor == "qkv_input" else made.hidden_out
        if tensor != "input":
            return self.hidden
        return 2 * self.width if self.gated else self.width

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Recompute both factors from the FFN's input, past all hooks.

        Args:
            x: [..., d].

        Returns:
            u and g, each [..., d_ff]; without a gate, W_u x (before the nonlinearity) and None.
        """
        # forward() and not the module itself: hooks see only what the model computes.
        output = self.up.module.forward(x)
        u = self.up.columns(output)
        if self.gate is None:
            return u, None
        if self.gate.module is not self.up.module:
            output = self.gate.module.forward(x)
        return u, self.activation.function(self.gate.columns(output))

    def intermediate(self, x: Tensor) -> Tensor:
        """The input [..., d_ff] of the down projection, recomputed from x [..., d]."""
        u, g = self.factors(x)
        return self.activation.function(u) if g is None else u * g

    def output(self, i: Tensor) -> Tensor:
        """The down projection's output [..., d] for its input i [..., d_ff]."""
        return self.down(i)

    def describe(self) -> dict[str, Any]:
        """What `bind_ffns` needs to find this FFN again, as JSON."""

        def place(projection: Projection) -> dict[str, Any]:
            return {"module": projection.path, "half": projection.half}

        return {
            "layer": self.layer,
            "hidden": self.hidden,
            "width": self.width,
            "gated": self.gated,
            "up": place(self.up),
            "gate": place(self.gate) if self.gate is not None else None,
            "activation": {
                "name": self.activation.name,
                "module": self.activation.path,
                "shared": self.activation.path is not None and self.activation.module is None,
            },
            "down": place(self.down),
            "overwritten": self.overwritten,
            "attention": self.attention.describe() if self.attention is not None else None,
        }


def layer_path(ffn: FFN, ffns: Sequence[FFN]) -> str:
    """The largest module around an FFN that holds no other: its layer. Empty if there is none."""
    parts = ffn.down.path.split(".")
    for count in range(1, len(parts)):
        place = ".".join(parts[:count])
        inside = (other.down.path.startswith(f"{place}.") for other in ffns if other is not ffn)
        if not any(inside):
            return place
    return ""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name: of transformers' table, or of `ACTIVATIONS` in torch.

    Raises:
        AtlasError: no such function.
    """
    if name in ACT2FN and name not in WITH_WEIGHTS:
        function: Callable[[Tensor], Tensor] = ACT2FN[name]
        return function
    if name in ACTIVATIONS:
        function = getattr(F, name)
        return function
    known = sorted({*ACT2FN, *ACTIVATIONS} - {*WITH_WEIGHTS})
    raise AtlasError(
        f"modules: activation: '{name}' is neither a module of the model nor a known function; "
        f"known: {', '.join(known)}"
    )


def bind_ffns(model: nn.Module, descriptions: list[dict[str, Any]]) -> list[FFN]:
    """Bind described FFNs to a model's modules, without a probe.

    Args:
        model: the model that `find_ffns` looked at, perhaps loaded again.
        descriptions: `FFN.describe()` of each layer, as stored in model.json.

    Raises:
        AtlasError: the model has no module of that name.
    """

    def find(path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError as error:
            raise AtlasError(
                f"model.json: ffn: {path}: {type(model).__name__} has no such module; "
                "delete model.json to have the model described again"
            ) from error

    def projection(place: dict[str, Any]) -> Projection:
        return Projection(place["module"], find(place["module"]), place["half"])

    def activation(entry: dict[str, Any]) -> Activation:
        if entry["module"] is None:
            return Activation(entry["name"], activation_function(entry["name"]))
        module = find(entry["module"])
        own = None if entry["shared"] else module
        return Activation(entry["name"], module.forward, entry["module"], own)

    def attention(entry: dict[str, Any] | None) -> Attention | None:
        # A manifest of an earlier release has none.
        return None if entry is None else bind_attention(entry, find)

    return [
        FFN(
            layer=entry["layer"],
            hidden=entry["hidden"],
            width=entry["width"],
            up=projection(entry["up"]),
            gate=projection(entry["gate"]) if entry["gate"] is not None else None,
            activation=activation(entry["activation"]),
            down=projection(entry["down"]),
            model=model,
            overwritten=entry["overwritten"],
            attention=attention(entry.get("attention")),
        )
        for entry in descriptions
    ]
