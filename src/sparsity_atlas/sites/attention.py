"""One layer's attention: the linear maps beside those of the other parts, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.module_hooks import on_input
from sparsity_atlas.sites.part import Given, Observer, Rewriter, Vectors
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.terms import ATTENTION, ATTENTION_TENSORS, PlaceKey


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
    """

    layer: int
    qkv: tuple[Projection, ...]
    o: Projection
    hidden: int
    width: int
    made: int
    hidden_out: int
    model: nn.Module = field(repr=False)

    @property
    def name(self) -> str:
        """See `Part`."""
        return ATTENTION

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `Part.tensors`."""
        return ATTENTION_TENSORS

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

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """See `Part.readers`."""
        return self.qkv if tensor == "qkv_input" else (self.o,)

    def size(self, tensor: str) -> int:
        """See `Part.size`."""
        return self.hidden if tensor == "qkv_input" else self.width

    def outputs(self, tensor: str) -> int:
        """See `Part.outputs`."""
        return self.made if tensor == "qkv_input" else self.hidden_out

    def recompute(self, given: Given, tensor: str) -> Tensor:
        """See `Part.recompute`.

        Raises:
            AtlasError: always: what it reads follows from more than one token.
        """
        raise AtlasError(f"layer {self.layer}: {tensor} does not follow from the FFN's input")

    def within(self, site: str) -> tuple[str, ...]:
        """See `Part.within`: each tensor has maps of its own."""
        if site == "all_linear_inputs":
            return ATTENTION_TENSORS
        return (site,) if site in ATTENTION_TENSORS else ()

    def sources(self, site: str) -> tuple[str, ...]:
        """See `Part.sources`."""
        return (site,)

    def run(self, given: Given, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """See `Part.run`."""
        x = given[site]
        if rewrite is not None:
            changed = rewrite(Vectors(self, site, x), x)
            x = x if changed is None else changed
        return torch.cat([projection(x) for projection in self.readers(site)], dim=-1)

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
