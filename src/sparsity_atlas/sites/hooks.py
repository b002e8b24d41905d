"""Read and change the tensors of every part of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.part import (
    Observer,
    Part,
    Rewriter,
    Vectors,
    by_layer,
    sites_of,
)
from sparsity_atlas.terms import MASKED, SITES, TENSORS, by_projection, everywhere

MaskOf = Callable[[Vectors], "Tensor | None"]


def _tensors(parts: Sequence[Part], sites: Iterable[str]) -> list[str]:
    names: set[str] = set()
    for site in sites:
        if by_projection(site):
            names.update(TENSORS[everywhere(site)])
            continue
        if site not in SITES:
            raise AtlasError(f"unknown site '{site}'; known: {', '.join(SITES)}")
        if site not in sites_of(parts):
            layer, there = _without(parts, site)
            raise AtlasError(
                f"site '{site}': layer {layer} has none; its sites are {', '.join(there)}"
            )
        names.update(TENSORS[site])
    return [name for name in MASKED if name in names]


def _without(parts: Sequence[Part], site: str) -> tuple[int, tuple[str, ...]]:
    """The first layer without a site that not all have, and the sites that it has."""
    layers = {layer: sites_of(own) for layer, own in by_layer(parts).items()}
    return next((layer, there) for layer, there in layers.items() if site not in there)


@contextmanager
def observe(parts: Sequence[Part], sites: Iterable[str], callback: Observer) -> Iterator[None]:
    """Show the tensors of some sites, as the model makes them, without changing anything.

    Args:
        parts: of one model.
        sites: any of `SITES`; each tensor is shown once, however many of them name it.
        callback: called with the vectors of each part and tensor, in the order of the forward pass.

    Raises:
        AtlasError: a site that a layer does not have; from a forward pass of the model in which a
            tensor of some layer did not come by exactly once.
    """
    names = _tensors(parts, [sites] if isinstance(sites, str) else sites)
    places = [(part, name) for part in parts for name in names if name in part.tensors]
    with observe_places(parts[0].model, places, callback):
        yield


@contextmanager
def observe_places(
    model: nn.Module, places: Iterable[tuple[Part, str]], callback: Observer
) -> Iterator[None]:
    """Show some tensors of some parts, as the model makes them, without changing anything.

    Args:
        model: whose parts they are.
        places: parts, and of each one of its `observable`.
        callback: as of `observe`.

    Raises:
        AtlasError: as `observe`, from a forward pass.
    """
    with ExitStack() as stack:
        forwards = ForwardWatch(model, stack)
        for part, name in places:
            part.observe(stack, forwards, name, callback)
        yield


@contextmanager
def intercept(parts: Sequence[Part], site: str, rewrite: Rewriter) -> Iterator[None]:
    """Replace what the parts compute with, at one site: the general form of `transform`.

    Zeroing entries of u or of g zeroes the same entries of i = u ⊙ g. So only x and i are ever
    written: for `input` before the up and gate projections, else before the down projection.

    Args:
        parts: of one model.
        site: one of `SITES`.
        rewrite: called once for each part and tensor with the vectors that the site means and the
            tensor to write (i for `up` and `gate`, for the others the same one). Returns the
            replacement, of the same shape and type, or None for no change. It must not write in
            place: x has other readers.

    Raises:
        AtlasError: as `observe`.
    """
    names = _tensors(parts, [site])
    with ExitStack() as stack:
        forwards = ForwardWatch(parts[0].model, stack)
        for part in parts:
            for name in names:
                if name in part.tensors:
                    part.rewrite(stack, forwards, name, rewrite)
        yield


@contextmanager
def transform(parts: Sequence[Part], site: str, mask_of: MaskOf) -> Iterator[None]:
    """Zero entries at one site of all parts.

    Args:
        parts: of one model.
        site: one of `SITES`; `all_inputs` masks x, and then the i that follows from it.
        mask_of: called with the vectors of each part and tensor; returns a bool mask of their shape,
            True = keep, or None to keep everything. Entries masked out become exact zeros, NaN and
            infinities included; kept ones keep every bit.

    Raises:
        AtlasError: as `observe`, or a mask that is not bool or not of the tensor's shape.
    """

    def rewrite(vectors: Vectors, write: Tensor) -> Tensor | None:
        mask, read = mask_of(vectors), vectors.values
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != read.shape:
            raise AtlasError(
                f"layer {vectors.part.layer}: {vectors.tensor}: found a mask of type {mask.dtype} and "
                f"shape {list(mask.shape)}, expected torch.bool and {list(read.shape)}"
            )
        return torch.where(mask, write, 0)

    with intercept(parts, site, rewrite):
        yield
