"""What stands in place of modules' own forward passes, or hangs on them; and what holds while it does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

Found = TypeVar("Found")


def attached(module: nn.Module) -> list[Any]:
    """Forward passes and hooks of a module and all within, in their order; None for one of its class."""
    found = []
    for one in module.modules():
        found += [one.__dict__.get("forward"), *one._forward_hooks.values()]
        found += one._forward_pre_hooks.values()
    return found


class Unchanged(Generic[Found]):
    """What was found out about layers, by place: none is asked again while the same hangs on it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[Any], Found]] = {}

    def of(self, place: int, layer: nn.Module, find: Callable[[], Found]) -> Found:
        """What is known of a layer, or else what `find` gives."""
        now = attached(layer)
        before, found = self._known.get(place, (None, None))
        if before is None or len(before) != len(now) or not all(map(operator.is_, before, now)):
            # What was known goes first: it may hold weights.
            self._known.pop(place, None)
            found = find()
            self._known[place] = now, found
        return found  # type: ignore[return-value]
