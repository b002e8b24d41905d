"""One layer's attention: the linear maps beside those of the other parts, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.by_projection import queries_keys_values
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.module_hooks import on_input
from sparsity_atlas.sites.part import Given, Observer, Rewriter, Vectors
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import (
    ATTENTION,
    ATTENTION_TENSORS,
    PROJECTED,
    TENSORS,
    PlaceKey,
    by_projection,
    plain,
)


@dataclass(frozen=True, eq=False)
class Attention:
    """The maps that make queries, keys and values of one tensor, and the map of what comes of them.

    A `Part`.

    Attributes:
        layer: index of the decoder's layer.
        qkv: those that read the layer's input: one, two or three modules.
        o: the output map.
        hidden: entries that `qkv` read.
        width: entries that `o` reads.
        made: entries that `qkv` make together.
        hidden_out: entries that `o` makes.
        model: whose layer it is.
        split: each of `qkv` reads a tensor of its own, see `Part.by_projection`.
    """

    layer: int
    qkv: tuple[Projection, ...]
    o: Projection
    hidden: int
    width: int
    made: int
    hidden_out: int
    model: nn.Module = field(repr=False)
    split: bool = False

    @property
    def name(self) -> str:
        """See `Part`."""
        return ATTENTION

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `Part.tensors`."""
        return (*PROJECTED["qkv_input"], "o_input") if self.split else ATTENTION_TENSORS

    @property
    def observable(self) -> tuple[str, ...]:
        """See `Part.observable`."""
        return ATTENTION_TENSORS

    @property
    def paths(self) -> tuple[str, ...]:
        """See `Part.paths`."""
        return tuple(dict.fromkeys(place.path for place in (*self.qkv, self.o)))

    @property
    def activation(self) -> None:
        """See `Part.activation`."""

    def rows_are_tokens(self, tensor: str) -> bool:
        """See `Part.rows_are_tokens`."""
        return True

    def routing(self, tensor: str) -> None:
        """See `Part.routing`: they are not."""

    @property
    def experts(self) -> tuple[()]:
        """See `Part.experts`."""
        return ()

    def apart(self) -> Self:
        """See `Part.apart`: all rows meet the same weights."""
        return self

    def by_projection(self) -> Self:
        """See `Part.by_projection`.

        Raises:
            AtlasError: queries, keys and values do not have a map each.
        """
        if queries_keys_values([projection.path for projection in self.qkv]) is None:
            raise AtlasError(f"layer {self.layer}: queries, keys and values have no map each")
        return replace(self, split=True)

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """See `Part.readers`."""
        if tensor in PROJECTED["qkv_input"]:
            order = queries_keys_values([projection.path for projection in self.qkv])
            assert order is not None, "looked at before it was split"
            return (self.qkv[order[PROJECTED["qkv_input"].index(tensor)]],)
        return self.qkv if tensor == "qkv_input" else (self.o,)

    def size(self, tensor: str) -> int:
        """See `Part.size`."""
        return self.width if tensor == "o_input" else self.hidden

    def outputs(self, tensor: str) -> int:
        """See `Part.outputs`."""
        if tensor in PROJECTED["qkv_input"]:
            return self._made[tensor]
        return self.made if tensor == "qkv_input" else self.hidden_out

    @cached_property
    def _made(self) -> dict[str, int]:
        """Entries of queries, keys and values."""
        maps = {name: self.readers(name)[0] for name in PROJECTED["qkv_input"]}
        with torch.no_grad():
            return {
                name: one(one.like(self.model).new_zeros(1, self.hidden)).shape[-1]
                for name, one in maps.items()
            }

    def recompute(self, given: Given, tensor: str) -> Tensor:
        """See `Part.recompute`.

        Raises:
            AtlasError: always: what it reads follows from more than one token.
        """
        raise AtlasError(f"layer {self.layer}: {tensor} does not follow from the FFN's input")

    def within(self, site: str) -> tuple[str, ...]:
        """See `Part.within`: each tensor has maps of its own."""
        own = ("qkv_input@projections", "o_input") if by_projection(site) else ATTENTION_TENSORS
        if plain(site) == "all_linear_inputs":
            return own
        return (site,) if site in own else ()

    def sources(self, site: str) -> tuple[str, ...]:
        """See `Part.sources`."""
        return (plain(site),)

    def run(self, given: Given, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """See `Part.run`."""
        x = given[plain(site)]
        made = []
        for tensor in TENSORS[site]:
            changed = None if rewrite is None else rewrite(Vectors(self, tensor, x), x)
            read = x if changed is None else changed
            made += [projection(read) for projection in self.readers(tensor)]
        return torch.cat(made, dim=-1)

    def observe(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Observer) -> None:
        """See `Part.observe`."""

        def show(values: Tensor) -> None:
            act(Vectors(self, tensor, values))

        self._hook(stack, forwards, tensor, show)

    def rewrite(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Rewriter) -> None:
        """See `Part.rewrite`."""

        def change(values: Tensor) -> Tensor | None:
            return act(Vectors(self, tensor, values), values)

        self._hook(stack, forwards, tensor, change)

    def _hook(
        self,
        stack: ExitStack,
        forwards: ForwardWatch,
        tensor: str,
        act: Callable[[Tensor], Tensor | None],
    ) -> None:
        key = PlaceKey(self.layer, self.name, tensor)
        on_input(stack, forwards, key, self.readers(tensor), act)

    def describe(self) -> dict[str, Any]:
        """See `Part.describe`."""
        return {
            "qkv": [projection.path for projection in self.qkv],
            "o": self.o.path,
            "hidden": self.hidden,
            "width": self.width,
            "outputs": self.made,
            "hidden_out": self.hidden_out,
        }
