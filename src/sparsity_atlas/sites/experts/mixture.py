"""A layer's routed experts as one of its parts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.experts.expert import Expert
from sparsity_atlas.sites.experts.grouping import Grouping
from sparsity_atlas.sites.experts.implementation import RECEIVED, installed
from sparsity_atlas.sites.experts.routed import RoutedExperts, bind_routed, by_token
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.part import (
    Observer,
    Rewriter,
    Routing,
    Vectors,
    within_one_output,
)
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import EXPERTS, PlaceKey


@dataclass(frozen=True, eq=False)
class RoutedVectors(Vectors):
    """What routed experts have as one tensor in a pass.

    Attributes:
        values: of `input` [batch, tokens, d], unless it is taken apart; of the others the rows of all pairs
            of a token and one of its experts, sorted by expert: [batch · tokens · K, w].
        grouping: which row is of which token and expert.
        batch: sequences and tokens of the pass.
    """

    grouping: Grouping
    batch: tuple[int, int]

    @property
    def experts(self) -> Tensor:
        """The expert of each row [S] of `values`; of `input` those of each token, [batch, tokens, K]."""
        if self.part.rows_are_tokens(self.tensor):
            by_token: Tensor = self.grouping.index.unflatten(0, self.batch)
            return by_token
        return self.grouping.experts

    def of_tokens(self, counts: Tensor) -> Tensor:
        """See `Vectors.of_tokens`: added up over a token's experts; of bools, whether all are true."""
        if self.part.rows_are_tokens(self.tensor):
            return counts
        together: Tensor = by_token(self.grouping, counts).unflatten(0, self.batch)
        return together

    @property
    def spread(self) -> Grouping | None:
        """See `Vectors.spread`."""
        return None if self.part.rows_are_tokens(self.tensor) else self.grouping


class _OneForEachExpert(Projection):
    """The maps of all experts, which no single row of a tensor goes through together."""

    def __call__(self, x: Tensor) -> NoReturn:
        self._refuse()

    def weight(self) -> NoReturn:
        """See `Projection.weight`.

        Raises:
            AtlasError: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AtlasError(
            f"{self.path}: each expert has weights of its own: a criterion that looks at weights says so by "
            "looks_at_weights = True, and is then bound to each expert by itself"
        )


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of a layer. A `Part`.

    Attributes:
        layer: index of the decoder's layer.
        routed: the experts.
        model: whose layer it is.
        handed_out: whether `input` is what each expert receives, and not what a token has for all of them.
    """

    layer: int
    routed: RoutedExperts
    model: nn.Module = field(repr=False)
    handed_out: bool = False

    @property
    def name(self) -> str:
        """See `Part`."""
        return EXPERTS

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `Part.tensors`."""
        return self.routed.tensors

    @property
    def paths(self) -> tuple[str, ...]:
        """See `Part.paths`."""
        return (self.routed.path,)

    @property
    def activation(self) -> Activation | None:
        """See `Part.activation`: none where the class's own gate holds it."""
        function = getattr(self.routed.module, "act_fn", None)
        if not isinstance(function, nn.Module):
            return None
        path = f"{self.routed.path}.act_fn"
        return Activation(path, function.forward, path)

    def rows_are_tokens(self, tensor: str) -> bool:
        """See `Part.rows_are_tokens`: the others are rows of a token and one of its experts."""
        return tensor == "input" and not self.handed_out

    def routing(self, tensor: str) -> Routing:
        """See `Part.routing`."""
        width = self.routed.hidden if tensor == "input" else self.routed.width
        return Routing(self.routed.count, self.routed.each, width)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """See `Part.experts`."""
        activation = self.activation
        return tuple(
            Expert(self.layer, number, self.routed, activation, self.model)
            for number in range(self.routed.count)
        )

    def apart(self) -> Experts:
        """See `Part.apart`: of `input` a row for each expert of a token."""
        return replace(self, handed_out=True)

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """See `Part.readers`: one for all experts, which cannot be called."""
        return (_OneForEachExpert(self.routed.path, self.routed.module),)

    def size(self, tensor: str) -> int:
        """See `Part.size`: of one token, in all of its experts."""
        if tensor == "input" and self.handed_out:
            return self.routed.each * self.routed.hidden
        return self.routed.size(tensor)

    def outputs(self, tensor: str) -> int:
        """See `Part.outputs`."""
        if tensor == "input" and self.handed_out:
            return self.routed.outputs(tensor) // self.routed.each
        return self.routed.outputs(tensor)

    def recompute(self, x: Tensor, tensor: str) -> Tensor:
        """See `Part.recompute`.

        Raises:
            AtlasError: always: which experts a row goes to is not said by the row.
        """
        self._refuse()

    def within(self, site: str) -> tuple[str, ...]:
        """See `Part.within`."""
        return within_one_output(site)

    def source(self, site: str) -> str:
        """See `Part.source`."""
        return "input"

    def run(self, x: Tensor, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """See `Part.run`.

        Raises:
            AtlasError: always, as `recompute`.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AtlasError(
            f"layer {self.layer}: what its routed experts compute cannot be told from their input without "
            "the routing: output errors and calibration are not supported for mixtures of experts"
        )

    def observe(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Observer) -> None:
        """See `Part.observe`."""

        def show(vectors: Vectors, _: Tensor) -> None:
            act(vectors)

        self.rewrite(stack, forwards, tensor, show)

    def rewrite(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Rewriter) -> None:
        """See `Part.rewrite`; of u and g, the entries of u ⊙ g are replaced."""
        path = self.routed.path
        counted = (PlaceKey(self.layer, self.name, tensor), path)
        forwards.counts[counted] = 0

        def change(grouping: Grouping, values: Tensor, write: Tensor) -> Tensor | None:
            forwards.fired(counted)
            batch, tokens, _ = forwards.by_token(grouping.index, path).shape
            if not self.rows_are_tokens(tensor):
                return act(RoutedVectors(self, tensor, values, grouping, (batch, tokens)), write)
            x = forwards.by_token(values, path)
            result = act(RoutedVectors(self, tensor, x, grouping, (batch, tokens)), x)
            return None if result is None else result.reshape(values.shape)

        stack.enter_context(installed(self.model))
        received = tensor == "input" and self.handed_out
        self.routed.tap(stack, RECEIVED if received else tensor, change)

    def describe(self) -> dict[str, Any]:
        """See `Part.describe`."""
        return {"layer": self.layer, "part": self.name, **self.routed.describe()}


def bind_experts(entry: dict[str, Any], model: nn.Module) -> Experts:
    """Bind described experts to a model's modules.

    Args:
        entry: `Experts.describe()`.
        model: that model, perhaps loaded again.
    """
    own = {key: value for key, value in entry.items() if key not in ("layer", "part", "attention")}
    return Experts(entry["layer"], bind_routed(own, model), model)
