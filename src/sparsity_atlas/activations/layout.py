"""Which of a model's tensors the store keeps, under which names and in which shapes.

    {tensor}/layer_000             of attention and dense FFNs   [token, channel]
    shared.{tensor}/layer_000      of shared experts             [token, channel]
    experts.input/layer_000        of routed experts             [token, channel]
    experts.{tensor}/layer_000     up, gate, intermediate        [token x K, channel]
    experts.index/layer_000        the experts of each token     int32 [token, K]
    experts.weights/layer_000      how much each of them counts  float32 [token, K]

With each tensor comes what its part's output follows from: the input, and the routing. A layer has an array
in the groups of its own parts only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparsity_atlas.loading.devices import ITEM_BYTES
from sparsity_atlas.terms import ATTENTION, ATTENTION_TENSORS, FFN, NAMED_PARTS, ROUTING, TENSORS

# Types of what is no activation.
_TYPES = {"index": "int32", "weights": "float32"}


def stored_type(tensor: str, computed: str) -> str:
    """Type of a tensor's values in the store, of a model that computes in another."""
    return _TYPES.get(tensor, computed)


def group_name(part: str, tensor: str) -> str:
    """Name of a tensor's group in the store."""
    return f"{part}.{tensor}" if part in NAMED_PARTS else tensor


def part_of(name: str) -> tuple[str, str]:
    """The part and the tensor that a group's name says."""
    part, _, tensor = name.rpartition(".")
    return part or (ATTENTION if tensor in ATTENTION_TENSORS else FFN), tensor


class Shape(NamedTuple):
    """Of a layer's array.

    rows: of a token.
    entries: of a row.
    experts: of how many the array names some; 0: of none.
    """

    rows: int
    entries: int
    experts: int = 0


@dataclass(frozen=True)
class Group:
    """One tensor of all parts of one name.

    Attributes:
        part: one of `terms.PARTS`.
        tensor: of the part.
        shapes: by the layers that have it.
    """

    part: str
    tensor: str
    shapes: dict[int, Shape] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In the store."""
        return group_name(self.part, self.tensor)

    def dtype(self, computed: str) -> str:
        """Type of the values of a model that computes in another."""
        return stored_type(self.tensor, computed)

    def token_bytes(self, computed: str) -> list[int]:
        """Bytes of one token in each layer's array."""
        item = ITEM_BYTES[self.dtype(computed)]
        return [one.rows * one.entries * item for one in self.shapes.values()]


def groups(described: Iterable[dict[str, Any]], sites: Iterable[str]) -> dict[str, Group]:
    """The groups of some sites of a model, by name, sorted.

    Args:
        described: the parts, as a model's manifest has them (`ffn`).
        sites: that the model has.
    """
    wanted = {"input", *ROUTING, *(tensor for site in sites for tensor in TENSORS[site])}
    found: dict[str, Group] = {}
    for entry in described:
        shapes = {(entry.get("part", FFN), name): shape for name, shape in _beside(entry).items()}
        if entry.get("attention"):
            own = entry["attention"]
            shapes[ATTENTION, "qkv_input"] = Shape(1, own["hidden"])
            shapes[ATTENTION, "o_input"] = Shape(1, own["width"])
        for (part, tensor), shape in shapes.items():
            if tensor in wanted:
                group = found.setdefault(group_name(part, tensor), Group(part, tensor))
                group.shapes[entry["layer"]] = shape
    return dict(sorted(found.items()))


def _beside(entry: dict[str, Any]) -> dict[str, Shape]:
    """Of a part that is not attention; nothing of a layer that is an attention alone."""
    if entry.get("part") == ATTENTION:
        return {}
    each = entry.get("each")  # experts of a token; only routed ones are described with it
    rows = 1 if each is None else each
    routing = {} if each is None else dict.fromkeys(ROUTING, Shape(1, each, entry["count"]))
    factors = dict.fromkeys(("up", "gate", "intermediate"), Shape(rows, entry["width"]))
    return {"input": Shape(1, entry["hidden"]), **factors, **routing}
