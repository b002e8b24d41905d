"""What a sparsified model has at a site's places over some text, and which level drops how much of it.

The text runs through the model with the criterion simulated, so that each layer sees what the layers before
it make of their own zeros, as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas import kernels
from sparsity_atlas.decoding.trial import fixed, unread
from sparsity_atlas.sites.find import intercept, observe_places
from sparsity_atlas.sparsify.attach import dropping
from sparsity_atlas.terms import EXPERTS, PlaceKey

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.sites.part import Part, Vectors

# A level is good enough where it drops so nearly what is wanted; tries to find it.
NEAR, TRIES = 0.004, 12


@dataclass(frozen=True)
class Seen:
    """A pass over the text at one level.

    Attributes:
        level: of the criterion.
        vectors: of the site's places before entries are dropped, and of what else products are given,
            [tokens, width] each.
        kept: of the site's places, bool [tokens, width].
    """

    level: float
    vectors: Mapping[PlaceKey, Tensor]
    kept: Mapping[PlaceKey, Tensor]

    @property
    def sparsity(self) -> float:
        """Share of the site's entries that are dropped or zero."""
        zeros = sum(float((~one).sum()) for one in self.kept.values())
        return zeros / sum(one.numel() for one in self.kept.values())

    def unread(self, place: PlaceKey, rows: Iterable[Tensor]) -> float:
        """Share of a place's rows of weights that no token of a group wants, mean over groups of tokens."""
        shares = [unread(self.kept[place][some]) for some in rows]
        return sum(shares) / len(shares)

    @property
    def dropped(self) -> dict[PlaceKey, float]:
        """Share of each place's entries that are dropped or zero."""
        return {place: float((~kept).float().mean()) for place, kept in self.kept.items()}

    def constants(self) -> dict[PlaceKey, Threshold]:
        """Of each place the constant that drops as much of this text as the criterion does."""
        return {place: fixed(self.vectors[place], share) for place, share in self.dropped.items()}

    def by(self, rules: Mapping[PlaceKey, Threshold]) -> Seen:
        """The same vectors, and which of their entries other rules keep."""
        masked = {
            place: kernels.masked(rule, self.vectors[place], self.vectors[place]).out
            for place, rule in rules.items()
        }
        return replace(self, kept={place: out != 0 for place, out in masked.items()})


class Text:
    """Some text that a model is run on again and again, with a criterion at one site."""

    def __init__(
        self,
        parts: Sequence[Part],
        site: str,
        bound: Mapping[PlaceKey, Criterion],
        ids: Tensor,
    ) -> None:
        """Look at the model.

        Args:
            parts: all that the site is in; experts' are sparsified, and no vectors of theirs are kept.
            site: where, one of `SITES`.
            bound: the criterion at each place.
            ids: int64 [sequences, positions].
        """
        self._parts, self._site, self._bound = parts, site, bound
        self._ids = ids.to(next(parts[0].model.parameters()).device)

    @property
    def tokens(self) -> int:
        """Of the text."""
        return self._ids.numel()

    def groups(self, size: int, count: int = 8) -> list[Tensor]:
        """Groups of so many tokens, as far from each other as they can be: int64 [size] each."""
        apart = self.tokens // size
        count = min(count, apart)
        return [apart * torch.arange(size) + index * apart // count for index in range(count)]

    def seen(self, level: float) -> Seen:
        """Run the text at a level."""
        vectors: dict[PlaceKey, Tensor] = {}
        kept: dict[PlaceKey, Tensor] = {}
        drops = {place: dropping(rule, level) for place, rule in self._bound.items()}

        def keep(found: Vectors) -> None:
            if found.key not in drops:
                vectors[found.key] = found.in_order().detach().clone()

        def rewrite(found: Vectors, onto: Tensor) -> Tensor | None:
            drop = drops.get(found.key)
            if drop is None:
                return None
            made = drop(found.values, onto, found.spread).out
            if found.part.name != EXPERTS:
                own = found.in_order().detach().clone()
                vectors[found.key] = own
                rule = self._bound[found.key].threshold(level, own.shape[-1]).to(own.device)
                kept[found.key] = kernels.masked(rule, own, own).out != 0
            return made

        given = [(part, "input") for part in self._parts if "input" in part.observable]
        given = [(part, name) for part, name in given if part.name != EXPERTS]
        model: Any = self._parts[0].model
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(observe_places(model, given, keep))
            stack.enter_context(intercept(self._parts, self._site, rewrite))
            model(input_ids=self._ids, use_cache=False)
        return Seen(level, vectors, kept)


class Levels:
    """Which level of a criterion drops which share of a text's entries.

    Known at first are the levels of a curve and what they induced in its tasks; each pass adds what its level
    drops of this text, and counts for more.
    """

    def __init__(
        self, text: Text, dense_level: float, harshest: float, nodes: Iterable[tuple[float, float]]
    ) -> None:
        """Begin with what a curve knows.

        Args:
            text: that is run.
            dense_level: that drops nothing.
            harshest: the other end, which drops all, or nearly.
            nodes: level and induced sparsity of a curve's nodes.
        """
        self._text, self._harshest = text, harshest
        self._nodes = list(nodes)
        self.dense = text.seen(dense_level)
        self._known = [(dense_level, self.dense.sparsity)]

    def at(self, level: float) -> Seen:
        """The text at a level."""
        found = self._text.seen(level)
        self._known.append((level, found.sparsity))
        return found

    def dropping(self, sparsity: float) -> Seen:
        """The text at the level that drops this share of it, or as nearly as one was found.

        Never less than is zero where the model is left as it is: its own zeros count.
        """
        best = self.dense
        if sparsity <= best.sparsity + NEAR:
            return best
        low, high = self._around(sparsity)
        guess = self._foretold(sparsity, low, high)
        for turn in range(TRIES):
            found = self.at(guess)
            best = min((best, found), key=lambda one: abs(one.sparsity - sparsity))
            if abs(best.sparsity - sparsity) <= NEAR:
                break
            if found.sparsity < sparsity:
                low = (guess, found.sparsity)
            else:
                high = (guess, found.sparsity)
            guess = _between(low, high, sparsity, halve=turn % 2 == 1)
        return best

    def _around(self, sparsity: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """The nearest levels that are known to drop less and more of the text."""
        low = max((one for one in self._known if one[1] < sparsity), key=lambda one: one[1])
        above = [one for one in self._known if one[1] >= sparsity]
        return low, min(above, key=lambda one: one[1], default=(self._harshest, 1.0))

    def _foretold(
        self, sparsity: float, low: tuple[float, float], high: tuple[float, float]
    ) -> float:
        """By the curve's nodes where these lie between."""
        ends = sorted((low[0], high[0]))
        nodes = [one for one in self._nodes if ends[0] < one[0] < ends[1]]
        below = max(
            (one for one in nodes if one[1] < sparsity), key=lambda one: one[1], default=low
        )
        above = min(
            (one for one in nodes if one[1] >= sparsity), key=lambda one: one[1], default=high
        )
        return _between(below, above, sparsity, halve=False)


def _between(
    low: tuple[float, float], high: tuple[float, float], sparsity: float, *, halve: bool
) -> float:
    """A level between two, on the straight line through what they drop, or in the middle."""
    share = 0.5 if halve or high[1] <= low[1] else (sparsity - low[1]) / (high[1] - low[1])
    least, most = sorted((low[0], high[0]))
    if least > 0 and most > 16 * least:
        # A threshold without an upper end: in the middle of the magnitudes.
        return float((least * most) ** 0.5)
    share = min(max(share, 0.02), 0.98)
    return low[0] + share * (high[0] - low[0])
