"""What the search for FFNs works with: calls of modules, factors, layouts that could be, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.sites.shaping import PLAIN, Shaping

# Columns that are looked at first: few are enough to refute.
QUICK_COLUMNS = 64


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding g, u ⊙ g or a matrix product to this type explains."""
    return max(torch.finfo(dtype).eps, 1e-5)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries, in float32; 0 where both are zero."""
    difference = torch.linalg.vector_norm(found.float() - expected.float())
    norm = torch.linalg.vector_norm(expected.float())
    return float(difference / norm.clamp_min(torch.finfo(torch.float32).tiny))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two [tokens, width] tensors have the same values, told by a few columns if not."""
    if a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(a[:, :QUICK_COLUMNS], b[:, :QUICK_COLUMNS]) and torch.equal(a, b)


@dataclass
class Factor:
    """The output of a projection, as put in: [tokens, d_ff], and its input [tokens, d]."""

    projection: Projection
    input: Tensor
    output: Tensor
    values: Tensor | None = None

    @property
    def path(self) -> str:
        """The module's name."""
        return self.projection.path

    def quick_values(self, functions: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """All functions of the first columns: [functions, tokens, columns]."""
        if self.values is None or len(self.values) != len(functions):
            few = self.output[:, :QUICK_COLUMNS]
            self.values = torch.stack([function(few) for function in functions.values()])
        return self.values


@dataclass
class Call:
    """One call of a module: flattened to [tokens, width]."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor
    factors: dict[int | None, Factor] = field(default_factory=dict)

    def factor(self, half: int | None) -> Factor:
        """The output, or a half of its columns, as a factor."""
        if half not in self.factors:
            projection = Projection(self.path, self.module, half)
            self.factors[half] = Factor(projection, self.input, projection.columns(self.output))
        return self.factors[half]


@dataclass(frozen=True)
class Hypothesis:
    """An FFN's layout, and how far the down projection's input is from it.

    Attributes:
        down: W_d.
        up: W_u.
        gate: W_g; None without one.
        activation: σ.
        hidden: entries of the FFN's input.
        width: entries of the factors.
        error: relative, of the input of the down projection.
        limit: what rounding explains.
        shaping: what becomes of the up projection's output before it is u.
        norm: of the product, before the down projection.
    """

    down: Projection
    up: Projection
    gate: Projection | None
    activation: Activation
    hidden: int
    width: int
    error: float
    limit: float
    shaping: Shaping = PLAIN
    norm: Projection | None = None

    def formula(self) -> str:
        """In words, for messages."""

        def name(projection: Projection) -> str:
            half = "" if projection.half is None else f"[half {projection.half}]"
            return f"{projection.path}{half}"

        if self.gate is None:
            return f"{self.activation.name}({name(self.up)})"
        return f"{name(self.up)} ⊙ {self.activation.name}({name(self.gate)})"


@dataclass
class Findings:
    """What the pass with random outputs found, in the order of execution."""

    proved: list[Hypothesis] = field(default_factory=list)
    closest: list[Hypothesis] = field(default_factory=list)
    """For down projections of the right shape without a proof: the layout with the least error."""
    elsewhere: list[Hypothesis] = field(default_factory=list)
    """Of the form of an FFN, but what they make is not added to the layer's output: gates of norms."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module ran."""
