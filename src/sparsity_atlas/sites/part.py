"""What a decoder's layer holds: its attention, a dense FFN, a shared expert, routed experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from sparsity_atlas.terms import (
    ATTENTION,
    ATTENTION_TENSORS,
    FFN_SITES,
    SITES,
    TENSORS,
    PlaceKey,
    by_projection,
    everywhere,
    layers_named,
    parts_named,
    plain,
)

if TYPE_CHECKING:
    # Which sites there are is asked by stages that start without torch.
    from contextlib import ExitStack

    from torch import Tensor, nn

    from sparsity_atlas.sites.activation import Activation
    from sparsity_atlas.sites.forward_watch import ForwardWatch
    from sparsity_atlas.sites.projection import Projection


@dataclass(frozen=True)
class Routing:
    """How a tensor's tokens are spread over experts.

    Attributes:
        experts: how many there are, E.
        each: how many of them a token meets, K.
        width: entries that one of them has of one token.
    """

    experts: int
    each: int
    width: int


@dataclass(frozen=True, eq=False)
class Vectors:
    """What one part has as one tensor in a forward pass, row by row.

    Attributes:
        part: whose it is.
        tensor: its name, one of the part's `observable`.
        values: [batch, tokens, width], or rows [..., width] of which a token has several, see
            `Part.rows_are_tokens`; the model's own: copy what is to be kept, change nothing.
    """

    part: Part
    tensor: str
    values: Tensor

    @property
    def key(self) -> PlaceKey:
        """Where they are."""
        return PlaceKey(self.part.layer, self.part.name, self.tensor)

    def of_tokens(self, counts: Tensor) -> Tensor:
        """What was counted of each row, by token: [batch, tokens]."""
        return counts

    def in_order(self) -> Tensor:
        """The values [rows, width], token behind token; of a token with several rows in their order."""
        return self.values.flatten(0, -2)

    @property
    def spread(self) -> Spread | None:
        """Which expert each row belongs to; None where all rows meet the same weights."""
        return None

    def of_each(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows such as the values, by token and by the experts that it meets.

        Returns:
            [batch, tokens, K, ...] and the experts, int [batch, tokens, K]; where all rows of a token meet
            the same weights K is 1, and there are no experts.
        """
        return rows.unsqueeze(2), None

    def of_pairs(self, counts: Tensor) -> tuple[Tensor, Tensor] | None:
        """What was counted of each row, by pairs of a token and one of its experts.

        Returns:
            The experts, int [batch · tokens, K], and the counts, of the same shape; None where there are
            no experts.
        """
        return None


class Spread(Protocol):
    """Rows [S, ...] of several experts, sorted by expert.

    Attributes:
        experts: int [S], the expert of each row, ascending.
        offsets: int32 [E], where each expert's rows end.
    """

    @property
    def experts(self) -> Tensor: ...
    @property
    def offsets(self) -> Tensor: ...


Given = Mapping[str, "Tensor"]
"""Tensors of one part and of the same tokens, by name: [..., width] each, with the same [...]."""
Observer = Callable[[Vectors], None]
Rewriter = Callable[[Vectors, "Tensor"], "Tensor | None"]
"""Takes the vectors that a site means and the tensor to write, of the same shape; gives what to put there."""


class Holder(Protocol):
    """What holds the weights that a row of a tensor meets: a part, or one of its experts.

    Attributes:
        layer: index of the decoder's layer.
        name: which of the layer's parts, one of `terms.PARTS`.
        model: the model that it belongs to.
    """

    @property
    def layer(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that it has, in the order in which a forward pass makes them."""

    @property
    def activation(self) -> Activation | None:
        """Its nonlinearity, if it has one."""

    def rows_are_tokens(self, tensor: str) -> bool:
        """Whether a tensor's values are [batch, tokens, width], with whole sequences to be seen."""

    def routing(self, tensor: str) -> Routing | None:
        """How a tensor's tokens are spread over experts; None if they are not."""

    @property
    def experts(self) -> tuple[Holder, ...]:
        """Those among which its rows are spread, each with weights of its own; none if they are not."""

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """The maps that read a tensor, or, of `up` and `gate`, what is made of it: W_d."""

    def size(self, tensor: str) -> int:
        """Entries of a tensor."""

    def outputs(self, tensor: str) -> int:
        """Entries that the readers make: the weights that each entry of the tensor meets."""


class Part(Holder, Protocol):
    """One thing that a layer computes, with the tensors in which entries can be dropped."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that hold its weights."""

    @property
    def observable(self) -> tuple[str, ...]:
        """What can be observed: its tensors, and what else `sources` names."""

    def apart(self) -> Part:
        """It as a rule sees it whose masks differ with the weights that a row meets.

        A row that several experts read is then one row for each of them; all else stays.
        """

    def by_projection(self) -> Part:
        """It where each map that reads `qkv_input` or `input` reads a tensor of its own, to be masked alone.

        Raises:
            AtlasError: several of them are one module.
        """

    def recompute(self, given: Given, tensor: str) -> Tensor:
        """One of its tensors, past all hooks, from what `sources` names of a site that concerns it.

        Returns:
            As `Vectors.in_order` gives it.
        """

    def within(self, site: str) -> tuple[str, ...]:
        """What a site is to this part: sites of its own, each with an output that it changes."""

    def sources(self, site: str) -> tuple[str, ...]:
        """The observable tensors from which the output that a site of its own changes can be computed."""

    def run(self, given: Given, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """Compute an output past all hooks.

        Args:
            given: the tensors `sources(site)`.
            site: one of its own, as `within` gives it.
            rewrite: what becomes of the site's tensors; None changes nothing.

        Returns:
            The part's output [..., hidden], or those of the maps that read the tensor, side by side.
        """

    def observe(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Observer) -> None:
        """Show a tensor to `act` in each forward pass of the model, until the stack is closed."""

    def rewrite(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Rewriter) -> None:
        """Have `act` replace a tensor, or what follows from it, in each forward pass of the model."""

    def describe(self) -> dict[str, Any]:
        """What binds the part to the model's modules again, as JSON."""


def by_layer(parts: Iterable[Part]) -> dict[int, list[Part]]:
    """The parts of each layer."""
    layers: dict[int, list[Part]] = {}
    for part in parts:
        layers.setdefault(part.layer, []).append(part)
    return layers


def sites_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """The sites that all parts concerned have, of which there must be one: layers may lack such a part."""
    every = list(parts)
    return tuple(site for site in SITES if all(_have(every, name) for name in TENSORS[site]))


def _have(parts: Sequence[Part], tensor: str) -> bool:
    concerned = [one for one in parts if (one.name == ATTENTION) == (tensor in ATTENTION_TENSORS)]
    return bool(concerned) and all(tensor in one.tensors for one in concerned)


def chosen(parts: Sequence[Part], site: str) -> tuple[list[Part], str]:
    """The parts that a site as paths spell it is confined to, all where it is not, and the site in these."""
    names, layers = parts_named(site), layers_named(site)
    own = [part for part in parts if not names or part.name in names]
    own = [part for part in own if not layers or part.layer in layers]
    if by_projection(site):
        tensors = TENSORS[plain(site)]
        # Of parts that have nothing to do with the site, it is not asked whether they could.
        concerned = [part for part in own if any(tensor in part.tensors for tensor in tensors)]
        own = [part.by_projection() for part in concerned]
    return own, everywhere(site)


def having(parts: Iterable[Part], tensor: str) -> list[Part]:
    """Those that have a tensor."""
    return [part for part in parts if tensor in part.tensors]


def within_one_output(site: str) -> tuple[str, ...]:
    """`Part.within` where whatever is dropped changes one output: of all that is not attention."""
    if site == "all_linear_inputs":
        return ("all_inputs",)
    return (site,) if site in FFN_SITES else ()


class Measures(TypedDict):
    """A model's sizes: its decoder's layers, the entries of its residual stream and of its widest FFN."""

    layers: int
    hidden: int
    width: int


def measure(parts: Sequence[Part]) -> Measures:
    """The sizes of the model whose parts these are."""
    beside = [part for part in parts if part.name != ATTENTION]
    config: Any = getattr(parts[0].model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(text, "num_hidden_layers", None)
    # Layers without a part count, too, and the last may be one.
    known = 1 + max(part.layer for part in parts)
    return {
        "layers": max(known, said) if isinstance(said, int) else known,
        "hidden": beside[0].size("input"),
        "width": max(part.size("intermediate") for part in beside),
    }
