"""The curves of a run in few words.

A command line of Linux holds 128 KiB in one argument, which the paths of some two thousand curves
exceed. A grid is a product, or few, and is written as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsity_atlas.config.grid import Curve

Key = tuple[str, str, str]
"""Model, criterion and site."""


def fold(curves: Iterable[Curve]) -> str:
    """The curves as JSON: [[models, [[criterion, sites], ...]], ...], in their order."""
    offers = [
        (model, [[name, [one.site for one in of]] for name, of in groupby(own, _criterion)])
        for model, own in groupby(curves, lambda curve: curve.model)
    ]
    return json.dumps(
        [
            [[model for model, _ in same], offer]
            for offer, same in groupby(offers, lambda one: one[1])
        ],
        separators=(",", ":"),
    )


def unfold(text: str) -> Iterator[Key]:
    """The curves that `fold` wrote, in their order."""
    for models, offer in json.loads(text):
        for model in models:
            for criterion, sites in offer:
                for site in sites:
                    yield model, criterion, site


def _criterion(curve: Curve) -> str:
    return curve.criterion
