"""A layer's routed experts as one of its parts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.experts.expert import Expert
from sparsity_atlas.sites.experts.grouping import Grouping, group
from sparsity_atlas.sites.experts.implementation import (
    RECEIVED,
    Act,
    Tap,
    compute,
    products,
    running,
    tapped,
)
from sparsity_atlas.sites.experts.routed import RoutedExperts, bind_routed, by_token
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.part import (
    Given,
    Observer,
    Part,
    Rewriter,
    Routing,
    Vectors,
    within_one_output,
)
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import EXPERTS, ROUTING, TENSORS, PlaceKey


@dataclass(frozen=True, eq=False)
class RoutedVectors(Vectors):
    """What routed experts have as one tensor in a pass.

    Attributes:
        values: of `input` [batch, tokens, d], unless it is taken apart; of the routing [batch, tokens, K];
            of the others the rows of all pairs of a token and one of its experts, sorted by expert:
            [batch · tokens · K, w].
        grouping: which row is of which token and expert.
        batch: sequences and tokens of the pass; whatever stands before the width where a part is run by
            itself.
    """

    grouping: Grouping
    batch: tuple[int, ...]

    @property
    def experts(self) -> Tensor:
        """The expert of each row [S] of `values`; of `input` those of each token, [batch, tokens, K]."""
        if self.part.rows_are_tokens(self.tensor):
            return self.experts_of_tokens()
        return self.grouping.experts

    def experts_of_tokens(self) -> Tensor:
        """The experts of each token: int [batch, tokens, K]."""
        by_token: Tensor = self.grouping.index.unflatten(0, self.batch)
        return by_token

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

    def in_order(self) -> Tensor:
        """See `Vectors.in_order`: of a token the rows of its experts, as the routing names them."""
        if self.part.rows_are_tokens(self.tensor):
            return self.values.flatten(0, -2)
        return self.grouping.ungrouped(self.values).flatten(0, 1)

    def of_each(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Vectors.of_each`."""
        if self.part.rows_are_tokens(self.tensor):
            return rows.unsqueeze(2), None
        by_token: Tensor = self.grouping.ungrouped(rows).unflatten(0, self.batch)
        return by_token, self.experts_of_tokens()

    def of_pairs(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Vectors.of_pairs`: what was counted of a token counts for each of its experts."""
        index = self.grouping.index
        of_tokens = self.part.rows_are_tokens(self.tensor)
        pairs = counts.reshape(-1, 1) if of_tokens else self.grouping.ungrouped(counts)
        return index, pairs.expand(index.shape)


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
    def observable(self) -> tuple[str, ...]:
        """See `Part.observable`: with the routing."""
        return (*self.tensors, *ROUTING)

    @property
    def paths(self) -> tuple[str, ...]:
        """See `Part.paths`."""
        return (self.routed.path,)

    @property
    def activation(self) -> Activation | None:
        """See `Part.activation`: none where the class's own gate holds it."""
        function = self.routed.nonlinearity()
        if function is None:
            return None
        path = f"{self.routed.path}.act_fn"
        return Activation(path, function.forward, path)

    def rows_are_tokens(self, tensor: str) -> bool:
        """See `Part.rows_are_tokens`: the others are rows of a token and one of its experts."""
        return tensor in ROUTING or (tensor == "input" and not self.handed_out)

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

    def by_projection(self) -> Experts:
        """See `Part.by_projection`.

        Raises:
            AtlasError: always: one row is handed to both maps of an expert.
        """
        raise AtlasError(f"layer {self.layer}: experts read one row for gate and up")

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

    def recompute(self, given: Given, tensor: str) -> Tensor:
        """See `Part.recompute`: of all but `input` a row for each token and each of its experts."""
        x, index, _ = self._flat(given)
        if self.rows_are_tokens(tensor):
            return x
        found: list[Tensor] = []

        def keep(grouping: Grouping, values: Tensor, _: Tensor) -> None:
            found.append(grouping.ungrouped(values).flatten(0, 1))

        grouping = group(index, self.routed.count)
        products(self.routed.module, x, grouping, [self._made_tap(tensor, keep)])
        return found[0]

    def within(self, site: str) -> tuple[str, ...]:
        """See `Part.within`."""
        return within_one_output(site)

    def sources(self, site: str) -> tuple[str, ...]:
        """See `Part.sources`: which experts a token goes to cannot be told from what they read."""
        return ("input", *ROUTING)

    def run(self, given: Given, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """See `Part.run`."""
        x, index, weights = self._flat(given)
        batch = given["input"].shape[:-1]

        def tap(tensor: str, act: Rewriter) -> Tap:
            def change(grouping: Grouping, values: Tensor, write: Tensor) -> Tensor | None:
                return self._change(tensor, grouping, batch, act, values, write)

            return self._made_tap(tensor, change)

        taps = [] if rewrite is None else [tap(tensor, rewrite) for tensor in TENSORS[site]]
        made: Tensor = compute(self.routed.module, x, index, weights, taps).unflatten(0, batch)
        return made

    def _flat(self, given: Given) -> list[Tensor]:
        return [given[name].flatten(0, -2) for name in ("input", *ROUTING)]

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
            batch = forwards.by_token(grouping.index, path).shape[:-1]
            return self._change(tensor, grouping, batch, act, values, write)

        stack.enter_context(running(self.model, self.routed.module))
        stack.enter_context(tapped(self.routed.module, self._made_tap(tensor, change)))

    def _made_tap(self, tensor: str, change: Act) -> Tap:
        received = tensor == "input" and self.handed_out
        return self.routed.made_tap(RECEIVED if received else tensor, change)

    def _change(
        self,
        tensor: str,
        grouping: Grouping,
        batch: tuple[int, ...],
        act: Rewriter,
        values: Tensor,
        write: Tensor,
    ) -> Tensor | None:
        """What `act` makes of a tensor [N, width], or of grouped rows."""
        if not self.rows_are_tokens(tensor):
            return act(RoutedVectors(self, tensor, values, grouping, batch), write)
        x = values.unflatten(0, batch)
        made = act(RoutedVectors(self, tensor, x, grouping, batch), x)
        return None if made is None else made.reshape(values.shape)

    def describe(self) -> dict[str, Any]:
        """See `Part.describe`."""
        return {"layer": self.layer, "part": self.name, **self.routed.describe()}


def met(parts: Iterable[Part]) -> int:
    """How many routed experts a token meets in a layer at most; 0 in a dense model."""
    return max((part.routed.each for part in parts if isinstance(part, Experts)), default=0)


def bind_experts(entry: dict[str, Any], model: nn.Module) -> Experts:
    """Bind described experts to a model's modules.

    Args:
        entry: `Experts.describe()`.
        model: that model, perhaps loaded again.
    """
    own = {key: value for key, value in entry.items() if key not in ("layer", "part", "attention")}
    return Experts(entry["layer"], bind_routed(own, model), model)
