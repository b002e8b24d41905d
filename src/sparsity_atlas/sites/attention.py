"""One layer's attention: the linear maps beside those of the FFN, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsity_atlas.sites.projection import Projection


@dataclass(frozen=True, eq=False)
class Attention:
    """The maps that make queries, keys and values of one tensor, and the map of what comes of them.

    Attributes:
        qkv: those that read the layer's input: one, two or three modules.
        o: the output map.
        hidden: entries that `qkv` read.
        width: entries that `o` reads.
        outputs: entries that `qkv` make together.
        hidden_out: entries that `o` makes.
    """

    qkv: tuple[Projection, ...]
    o: Projection
    hidden: int
    width: int
    outputs: int
    hidden_out: int

    def describe(self) -> dict[str, Any]:
        """What `bind_attention` needs to find this attention again, as JSON."""
        return {
            "qkv": [projection.path for projection in self.qkv],
            "o": self.o.path,
            "hidden": self.hidden,
            "width": self.width,
            "outputs": self.outputs,
            "hidden_out": self.hidden_out,
        }


def bind_attention(entry: dict[str, Any], find: Callable[[str], nn.Module]) -> Attention:
    """Bind a described attention to a model's modules.

    Args:
        entry: `Attention.describe()`.
        find: gives the module of a path.
    """
    return Attention(
        qkv=tuple(Projection(path, find(path)) for path in entry["qkv"]),
        o=Projection(entry["o"], find(entry["o"])),
        hidden=entry["hidden"],
        width=entry["width"],
        outputs=entry["outputs"],
        hidden_out=entry["hidden_out"],
    )
