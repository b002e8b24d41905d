"""Where each map that reads a vector may have a mask of its own, as TEAL, WINA and R-Sparse have it.

Queries, keys and values are made of one vector, and so are gate and up. That their maps get it with different
entries zeroed takes a module for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparsity_atlas.terms import ATTENTION, EXPERTS, FFN

# What a module's name says of what it makes, between underscores.
_NAMES = ({"q", "query", "wq"}, {"k", "key", "wk"}, {"v", "value", "wv"})
# Why there is nothing to be parted, where all else is well.
ONE_MAP = "one map reads the FFN's input"


def queries_keys_values(paths: Sequence[str]) -> tuple[int, ...] | None:
    """Which of some modules make queries, keys and values, in this order; None: their names do not tell."""
    words = [set(path.rpartition(".")[2].lower().split("_")) for path in paths]
    found = [[i for i, own in enumerate(words) if own & names] for names in _NAMES]
    if len(paths) != len(_NAMES) or any(len(one) != 1 for one in found):
        return None
    order = tuple(one for (one,) in found)
    return order if len(set(order)) == len(order) else None


def why_together(described: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Why the maps that read one vector cannot have masks of their own, by part; nothing of those that can.

    Args:
        described: as `descriptions.describe_parts` gives it.
    """
    found: dict[str, str] = {}
    for one in described:
        name, attention = one.get("part", FFN), one.get("attention")
        if attention is not None and queries_keys_values(attention["qkv"]) is None:
            modules = ", ".join(path.rpartition(".")[2] for path in attention["qkv"])
            found[ATTENTION] = f"queries, keys and values are made by {modules}, not by a map each"
        if name == EXPERTS:
            found[name] = "the rows that routed experts read have one mask for gate and up"
        elif name != ATTENTION:
            gate = one["gate"]
            if gate is None:
                found[name] = ONE_MAP
            elif gate["module"] == one["up"]["module"]:
                found[name] = (
                    f"gate and up are made by one map, {gate['module'].rpartition('.')[2]}"
                )
    return found
