"""How long the maps of each kind of part take, dense and where zeros are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from sparsity_atlas.decoding.backend import backend_of
from sparsity_atlas.decoding.maps import GatedFFN, InputMap
from sparsity_atlas.decoding.trial import dense_ffn, layers_of, own_ffn, timed
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.speed.products import READ, gated_of, joined, readers_of
from sparsity_atlas.speed.proved_matrix import matrix_of
from sparsity_atlas.speed.speed_table import NO_EXPERTS
from sparsity_atlas.speed.timed_rows import Dense, Point
from sparsity_atlas.terms import EXPERTS, TENSORS, PlaceKey

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.speed.text_vectors import Seen, Text

Product = GatedFFN | InputMap
# Rounds of a timing, as `timed` takes them, and seconds of all of them on a CPU: where kernels gain nothing
# they may take twenty times as long as the library's.
REPEATS, LONGEST = 20, 0.5
# Products of a round at most: of smaller maps what takes time is to call them, whatever a cache holds. On a
# GPU each call of a round is recorded for each timing, and a last cache is smaller.
MOST = {"cuda": 64, "cpu": 256}
# Maps that read one tensor, as the table calls them.
NAMES = {"input": "up", "intermediate": "down", "qkv_input": "qkv", "o_input": "o"}


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of one kind and shape that one product does, in some layers.

    Attributes:
        name: `ffn` as a whole, or which of its maps or of attention's.
        given: the tensor that the product gets.
        tensors: of the site, that are masked in it.
        parts: a layer's each.
        shape: inputs and outputs.
        weights: of a layer.
    """

    name: str
    given: str
    tensors: tuple[str, ...]
    parts: list[Part]
    shape: str
    weights: int

    def products(self, device: str, cold: float | None) -> list[tuple[Part, Product]]:
        """Enough of them that caches are cold after a round: of layers all over the model, or copies."""
        first = self._product(self.parts[0], copied=False)
        count = min(layers_of(self.weights, first.dtype, device, cold), MOST[device])
        own = len(self.parts)
        chosen = [index * own // count if count < own else index % own for index in range(count)]
        return [
            (self.parts[one], self._product(self.parts[one], copied=index >= own))
            for index, one in enumerate(chosen)
        ]

    def _product(self, part: Part, *, copied: bool) -> Product:
        if self.name != "ffn":
            return joined(part, self.given).product
        assert isinstance(part, FFN)
        up, gate, down, activation = gated_of(part)
        if copied:
            up, gate, down = up.clone(), gate.clone(), down.clone()
        (site,) = [site for site, tensors in TENSORS.items() if tensors == self.tensors]
        return GatedFFN(up, gate, down, activation, site)

    def unread(self, seen: Seen, groups: Sequence[Tensor]) -> float:
        """Share of their weights that no token of a group wants, mean over layers and groups."""
        shares = []
        for part in self.parts:
            for tensor in self.tensors:
                place = PlaceKey(part.layer, part.name, tensor)
                met = weights_met(part, tensor) * part.size(tensor)
                shares.append(seen.unread(place, groups) * met / self.weights)
        return sum(shares) / len(self.parts)


def weights_met(part: Part, tensor: str) -> int:
    """Weights that need not be read for an entry that is dropped: of a factor also the other one's row."""
    return part.outputs(tensor) * (2 if tensor in ("up", "gate") else 1)


def maps_at(
    parts: Sequence[Part], site: str, places: Iterable[PlaceKey]
) -> tuple[list[Maps], list[tuple[str, str]]]:
    """What the products do at a site, and of what else they do nothing, and why.

    Args:
        parts: of one model.
        site: one of `SITES`.
        places: where entries are dropped.

    Returns:
        The maps, and names with reasons, each once.
    """
    wanted = set(places)
    found: dict[tuple[str, str], Maps] = {}
    why: dict[str, str] = {}
    for part in parts:
        tensors = tuple(
            name for name in TENSORS[site] if PlaceKey(part.layer, part.name, name) in wanted
        )
        if not tensors:
            continue
        for maps in _of_part(part, tensors, why):
            known = found.setdefault((maps.name, maps.shape), maps)
            if known is not maps:
                known.parts.append(part)
    return list(found.values()), list(why.items())


def _of_part(part: Part, tensors: tuple[str, ...], why: dict[str, str]) -> Iterator[Maps]:
    if part.name == EXPERTS:
        why.setdefault(EXPERTS, NO_EXPERTS)
        return
    pair = isinstance(part, FFN) and part.gated
    if isinstance(part, FFN) and pair:
        try:
            up, _, down, _ = gated_of(part)
        except AtlasError as error:
            alone = any(name in READ for name in tensors)
            instead = (
                "its maps are timed one by one" if alone else "a factor by itself has no product"
            )
            why.setdefault("ffn", f"{error}; {instead}")
        else:
            shape = f"{up.shape[1]} to {up.shape[0]} to {down.shape[0]}, gated"
            yield Maps("ffn", "input", tensors, [part], shape, up.numel() * 2 + down.numel())
            return
        # One by one then, where what they read is masked.
        tensors = tuple(name for name in tensors if name in READ)
    for tensor in tensors:
        name = "up and gate" if pair and tensor == "input" else NAMES.get(tensor, tensor)
        try:
            held = [matrix_of(reader) for reader in readers_of(part, tensor).values()]
        except AtlasError as error:
            why.setdefault(name, str(error))
        else:
            shape = f"{held[0].shape[1]} to {sum(len(one) for one in held)}"
            yield Maps(name, tensor, (tensor,), [part], shape, sum(one.numel() for one in held))


def part_rows(
    maps: Maps,
    text: Text,
    points: Sequence[Point],
    tokens: Sequence[int],
    device: str,
    cold: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the table, of maps of one kind.

    Args:
        maps: that are timed.
        text: whose tokens go through them.
        points: sparsities, with the text's vectors there; the first leaves the model as it is.
        tokens: numbers of tokens that are decoded together.
        device: `cpu` or `cuda`.
        cold: bytes of weights that a round meets; None: several times the last cache.
    """
    products = maps.products(device, cold)
    first = products[0][1]
    for count in tokens:
        groups = text.groups(count)
        given = partial(_given, maps, products, groups)
        vectors = given(points[0])
        whole = {
            "library": _each(_library, vectors, products),
            "own": _each(_own, vectors, products),
        }
        dense = Dense()
        for by, calls in whole.items():
            dense.add(by, timed(calls, device, REPEATS, LONGEST))
        rows = []
        for point in points:
            vectors = given(point)
            for way in point.ways:
                share = maps.unread(way.seen, groups)
                dropped = way.seen.dropped
                calls = [
                    _masked(product, x, way.rules(part, maps.tensors), _of(part, dropped))
                    for x, (part, product) in zip(vectors, products, strict=True)
                ]
                rows.append(
                    {
                        **{"timed": maps.name, "context": None, "tokens": count},
                        **{"copies_bytes": first.copies},
                        **{"shape": maps.shape, "layers": len(maps.parts)},
                        **point.row(way, timed(calls, device, REPEATS, LONGEST), share),
                    }
                )
        # Once more: what else a machine did meanwhile may have come or gone.
        for by, calls in whole.items():
            dense.add(by, timed(calls, device, REPEATS, LONGEST))
        yield from dense.finished(rows, maps.weights * first.dtype.itemsize)


def _each(
    way: Callable[[Tensor, Product], Tensor],
    vectors: Sequence[Tensor],
    products: Sequence[tuple[Part, Product]],
) -> list[Callable[[], Tensor]]:
    return [partial(way, x, one) for x, (_, one) in zip(vectors, products, strict=True)]


def _given(
    maps: Maps,
    products: Sequence[tuple[Part, Product]],
    groups: Sequence[Tensor],
    point: Point,
) -> list[Tensor]:
    """What each product gets: tokens of the text, others in each."""
    return [
        point.seen.vectors[PlaceKey(part.layer, part.name, maps.given)][groups[index % len(groups)]]
        for index, (part, _) in enumerate(products)
    ]


def _library(x: Tensor, product: Product) -> Tensor:
    if isinstance(product, GatedFFN):
        return dense_ffn(x, product)
    return F.linear(x, product.weight, product.bias)


def _own(x: Tensor, product: Product) -> Tensor:
    """By our kernels, with nothing dropped."""
    if isinstance(product, GatedFFN):
        return own_ffn(x, product)
    backend = backend_of(x, product.weight)
    if backend is None:
        return _library(x, product)
    return backend.by_inputs(Vector(x, expected=0.0), product.transposed, product.bias)


def _of(part: Part, dropped: Mapping[PlaceKey, float]) -> dict[str, float]:
    """What is dropped of each tensor of a part."""
    own = (part.layer, part.name)
    return {
        place.tensor: share for place, share in dropped.items() if (place.layer, place.part) == own
    }


def _masked(
    product: Product, x: Tensor, rules: Mapping[str, Threshold], dropped: Mapping[str, float]
) -> Callable[[], Tensor]:
    if isinstance(product, GatedFFN):
        return partial(product, x, rules, dropped)
    ((name, rule),) = rules.items()
    return partial(product, x, rule, dropped[name])
