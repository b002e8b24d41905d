"""The nonlinearity of a part: what it is called, and where the model has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.shaping import PLAIN, Shaping

# Those that the search tries, commonest first: of several names of one function only one.
ACTIVATIONS = (
    *("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "quick_gelu", "sigmoid"),
    *("gelu_fast", "tanh", "mish", "relu6", "leaky_relu", "hardswish", "gelu_10", "laplace"),
    *("sqrtsoftplus", "elu", "selu", "softplus", "softsign", "hardsigmoid"),
)
# Of transformers' table: functions with weights, which no name alone can give.
WITH_WEIGHTS = ("prelu", "xielu")


# The commonest name of a class stands for it.
_NAMES = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS) if name in ACT2FN}


def name_of(module: nn.Module) -> str:
    """What a nonlinearity is called: as in `ACTIVATIONS` where its class is of transformers' table.

    A class of another kind goes by its own name: GELU is gelu, FATReLU fatrelu.
    """
    kind = type(module)
    return _NAMES.get(kind, kind.__name__.removesuffix("Activation").lower())


@dataclass(frozen=True)
class Activation:
    """The nonlinearity σ: a module of the model (`path`), or a function of `ACTIVATIONS`."""

    name: str
    function: Callable[[Tensor], Tensor]
    path: str | None = None
    module: nn.Module | None = None
    """The module whose output is g: none for a function, or where several layers share it."""
    before: Shaping = PLAIN
    """What becomes of the map's output first."""

    def __call__(self, values: Tensor) -> Tensor:
        """What the model makes of the output of a map."""
        return self.function(self.before(values))


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
