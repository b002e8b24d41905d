"""What a prompt's mask is worth behind it: what it shares with later tokens' own, and what it costs.

Criteria such as TDA (arXiv 2408.11393) and GRIFFIN find neurons over the prompt and keep these for all
that follows. Here each later token is asked which neurons it would choose, as many as the prompt's mask
has, in the dense model; then all layers are masked, and the loss is that of the tokens behind the prompt.
The mask of another sequence's prompt tells how much of both is owed to this prompt, and how much to
neurons that are large whatever is said (arXiv 2405.09274 names both: dependence on history, and neurons
that do not follow the meaning).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparsity_atlas.criteria.base import PromptCriterion, SequenceCriterion
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.models.logits import head
from sparsity_atlas.sites.hooks import observe
from sparsity_atlas.sparsify.attach import applied
from sparsity_atlas.statistics.bootstrap import interval, resampled_shares
from sparsity_atlas.studies.continuation import continued
from sparsity_atlas.studies.prompt_table import (
    ADDED,
    COST,
    LOSS,
    OVERLAP,
    OVERLAP_ANOTHER,
    SCHEMA,
    SPARSITY,
)
from sparsity_atlas.studies.single_layer import model_of, token_nats

if TYPE_CHECKING:
    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.terms import Phase, PlaceKey

Masks = dict[tuple[str, "PlaceKey"], Tensor]


@dataclass(frozen=True)
class HowToRun:
    """Settings of the study.

    Attributes:
        continuations: some of `prompt_table.CONTINUATIONS`.
        batch_size: sequences a forward pass.
        replicates: of the bootstrap.
        seed: of the bootstrap, and of what is generated.
    """

    continuations: tuple[str, ...]
    batch_size: int
    replicates: int
    seed: int


def spans(later: int) -> list[tuple[int, int]]:
    """Distances behind the prompt that are looked at together: 1, 2 to 3, 4 to 7, …, and all of them."""
    doubling = [(1 << power, min(2 << power, later + 1) - 1) for power in range(later.bit_length())]
    return list(dict.fromkeys([*doubling, (1, later)])) if later else []


def reuse_table(
    criterion: Criterion,
    parts: Sequence[Part],
    site: str,
    states: Mapping[str, State],
    levels: Sequence[str],
    ids: np.ndarray,
    settings: Mapping[str, Any],
) -> pa.Table:
    """The study's table: empty if nothing is asked for, or the criterion keeps no prompt's mask.

    Args:
        criterion: of the curve.
        parts: of one causal model.
        site: where.
        states: of the criterion's calibration.
        levels: of the criterion, as spelled in paths.
        ids: [sequences, positions] of captured text.
        settings: as `grid.error_slice` gives them.

    Returns:
        Rows of `prompt_table.SCHEMA`.
    """
    asked = settings.get("prompt_reuse")
    if not asked or not isinstance(criterion, PromptCriterion):
        return SCHEMA.empty_table()
    bootstrap = settings["replicates"], settings["seed"]
    how = HowToRun(tuple(asked), settings["batch_size"], *bootstrap)
    tokens = torch.from_numpy(ids).long()
    rows = list(prompt_rows(criterion, parts, site, states, levels, tokens, how))
    return pa.Table.from_pylist(rows, SCHEMA)


def prompt_rows(
    criterion: PromptCriterion,
    parts: Sequence[Part],
    site: str,
    states: Mapping[str, State],
    levels: Sequence[str],
    ids: Tensor,
    how: HowToRun,
) -> Iterator[dict[str, Any]]:
    """Rows of `prompt_table.SCHEMA`.

    Args:
        criterion: that takes a prompt's mask for what follows it.
        parts: of one causal model.
        site: where.
        states: of its calibration.
        levels: of the criterion, as spelled in paths.
        ids: int64 [sequences, positions].
        how: settings.
    """
    rules = {}
    for after in ("prompt", "own"):
        rule = copy.copy(criterion)
        rule.after = after
        bound = bind_all(rule, parts, site, states)
        rules[after] = cast("dict[PlaceKey, PromptCriterion]", bound)
    whole = torch.ones(1, ids.shape[1], dtype=torch.bool)
    prompt = int(criterion.prompt_of(whole).sum())
    model = model_of(parts)
    head.able(model)  # found out before anything is attached
    for continuation in how.continuations:
        tokens = ids
        if continuation == "generated":
            tokens = continued(model, ids, prompt, how.batch_size, how.seed)
        study = _Study(parts, site, rules, tokens, prompt, how)
        for row in study.rows(levels):
            yield {"continuation": continuation, **row}


@dataclass
class _Cursor:
    """Which sequences a forward pass is of."""

    rows: slice = field(default_factory=lambda: slice(None))


class _Given(SequenceCriterion):
    """Masks that are given for each sequence, behind its prompt."""

    dense_level = 1.0
    coarse_levels = ()

    def __init__(self, masks: Tensor, prompt: int, cursor: _Cursor) -> None:
        self._masks, self._prompt, self._cursor = masks, prompt, cursor

    def mask_sequences(self, values: Tensor, valid: Tensor, phase: Phase, level: float) -> Tensor:
        """See `SequenceCriterion.mask_sequences`."""
        kept = self._masks[self._cursor.rows].to(values.device)
        found = torch.ones_like(values, dtype=torch.bool)
        found[:, self._prompt :] = kept[:, None]
        return found


class _Study:
    """One set of sequences."""

    def __init__(
        self,
        parts: Sequence[Part],
        site: str,
        rules: dict[str, dict[PlaceKey, PromptCriterion]],
        ids: Tensor,
        prompt: int,
        how: HowToRun,
    ) -> None:
        self._parts, self._site, self._rules, self._how = parts, site, rules, how
        self._model, self._ids, self._prompt = model_of(parts), ids, prompt
        # Half of the text away, so that it is seldom of the same document.
        count = len(ids)
        self._another = (torch.arange(count) + count // 2) % count
        self._cursor = _Cursor()

    def rows(self, levels: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows of `prompt_table.SCHEMA` without their continuation."""
        dense, masks = self._prompt_masks(levels)
        yield from self._overlaps(levels, masks)
        for level in levels:
            yield from self._losses(level, masks, dense)

    def _batches(self) -> Iterator[Tensor]:
        """The sequences of one forward pass after the other; the cursor says which they are."""
        size = self._how.batch_size
        for start in range(0, len(self._ids), size):
            self._cursor.rows = slice(start, start + size)
            yield self._ids[self._cursor.rows].to(self._model.device)

    def _seen(self, look: Any) -> np.ndarray:
        """Show the site's vectors of a dense pass; nats of the tokens behind the prompt."""
        found = []
        with torch.no_grad(), observe(self._parts, (self._site,), look):
            for rows in self._batches():
                found.append(token_nats(self._model, rows)[:, self._prompt :].double().cpu())
        return torch.cat(found).numpy()

    def _prompt_masks(self, levels: Sequence[str]) -> tuple[np.ndarray, Masks]:
        """Nats of the dense model, and each level's mask of each prompt: bool [sequences, width]."""
        made: dict[tuple[str, PlaceKey], list[Tensor]] = {}

        def look(vectors: Vectors) -> None:
            values = vectors.values
            counted = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
            counted[:, : self._prompt] = True
            rule = self._rules["prompt"][vectors.key]
            for level in levels:
                kept = rule.neurons(values, counted, float(level)).cpu()
                made.setdefault((level, vectors.key), []).append(kept)

        nats = self._seen(look)
        return nats, {key: torch.cat(some) for key, some in made.items()}

    def _overlaps(self, levels: Sequence[str], masks: Masks) -> Iterator[dict[str, Any]]:
        """What each later token's own neurons share with its prompt's mask, and with another's."""
        later = self._ids.shape[1] - self._prompt
        sums = {key: _Overlaps(later) for key in masks}

        def look(vectors: Vectors) -> None:
            values = vectors.values[:, self._prompt :]
            rule, device = self._rules["own"][vectors.key], values.device
            for level in levels:
                every = masks[level, vectors.key]
                kept = every[self._cursor.rows].to(device)
                another = every[self._another[self._cursor.rows]].to(device)
                sums[level, vectors.key].add(rule.own(values, kept), kept, another)

        self._seen(look)
        for (level, place), one in sums.items():
            kept = masks[level, place].double().mean(-1).numpy()
            names = {"level": level, **place._asdict()}
            other = kept[self._another.numpy()]
            yield {
                **{**names, "quantity": SPARSITY, "nearest": 1, "farthest": later},
                **self._numbers(SPARSITY, 1 - kept, np.ones_like(kept)),
            }
            for quantity, shared, chance in (
                (OVERLAP, one.shared(0), kept),
                (OVERLAP_ANOTHER, one.shared(1), other),
            ):
                if quantity == OVERLAP_ANOTHER and len(kept) == 1:
                    continue  # there is no other sequence
                for first, last in spans(later):
                    span = slice(first - 1, last)
                    counts = one.counted()[:, span].sum(1)
                    yield {
                        **{**names, "quantity": quantity, "nearest": first, "farthest": last},
                        **self._numbers(quantity, shared[:, span].sum(1), counts),
                        "chance": float(chance.mean()),
                    }

    def _losses(self, level: str, masks: Masks, dense: np.ndarray) -> Iterator[dict[str, Any]]:
        """Nats behind the prompt: of the dense model, and what masks of three kinds add."""
        others = {
            place: _Given(masks[level, place][self._another], self._prompt, self._cursor)
            for place in self._rules["prompt"]
        }
        ways: dict[str, Mapping[PlaceKey, SequenceCriterion]] = {**self._rules}
        if len(self._ids) > 1:
            ways["another"] = others
        nats = {name: self._masked(bound, float(level)) for name, bound in ways.items()}
        reused, own = nats["prompt"], nats["own"]
        found = {LOSS: dense if np.isfinite(dense).all() else None}
        for name, one in nats.items():
            found[ADDED[name]] = None if one is None or found[LOSS] is None else one - dense
        found[COST] = None if reused is None or own is None else reused - own
        for quantity, values in found.items():
            for first, last in spans(dense.shape[1]):
                row = {"level": level, "quantity": quantity, "nearest": first, "farthest": last}
                if values is not None:
                    some = values[:, first - 1 : last]
                    row |= self._numbers(quantity, some.sum(1), np.full(len(some), some.shape[1]))
                yield row

    def _masked(
        self, bound: Mapping[PlaceKey, SequenceCriterion], level: float
    ) -> np.ndarray | None:
        """Nats [sequences, tokens] behind the prompt with masks in all layers; None: not finite."""
        found = []
        try:
            with (
                torch.no_grad(),
                applied(self._model, self._parts, self._site, bound, level) as counter,
            ):
                for rows in self._batches():
                    counter.expect(torch.ones_like(rows, dtype=torch.bool))
                    found.append(token_nats(self._model, rows)[:, self._prompt :].double().cpu())
                    counter.take()
        except NumericalFailure:
            return None
        nats = torch.cat(found).numpy()
        return nats if np.isfinite(nats).all() else None

    def _numbers(self, name: str, sums: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
        """A mean over tokens with its interval, from sums and counts of each sequence."""
        if not counts.sum():
            return {"value": None}
        how = self._how
        drawn = resampled_shares(name, sums[None], counts[None], None, how.replicates, how.seed)
        value, *replicates = drawn[:, 0]
        ends = interval(value, np.array(replicates)) if replicates else (None, None)
        return {"value": float(value), "low": ends[0], "high": ends[1]}


class _Overlaps:
    """Of one place: shares of tokens' own masks, [sequences, tokens]."""

    def __init__(self, later: int) -> None:
        self._later = later
        self._shares: list[Tensor] = []
        self._counted: list[Tensor] = []

    def add(self, own: Tensor, kept: Tensor, another: Tensor) -> None:
        """Take some sequences: bool [batch, tokens, width], and [batch, width] of two prompts' masks."""
        count = own.sum(-1)
        shares = [(own & mask[:, None]).sum(-1) / count.clamp(min=1) for mask in (kept, another)]
        self._shares.append(torch.stack(shares).float().cpu())
        self._counted.append((count > 0).cpu())

    def shared(self, which: int) -> np.ndarray:
        """Shares that are in the prompt's mask (0), or in another's (1); 0 where a token keeps nothing."""
        return torch.cat([one[which] for one in self._shares]).double().numpy()

    def counted(self) -> np.ndarray:
        """Whether a token keeps anything."""
        return torch.cat(self._counted).double().numpy()
