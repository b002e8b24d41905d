"""Checkpoints along one training: an entry with `revisions` becomes a model for each of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas.config.model_entry import ModelEntry, RevisionEntry
from sparsity_atlas.errors import AtlasError

# As OLMo names its revisions. A later stage of a training counts its tokens anew.
_TOKENS = re.compile(r"tokens(\d+(?:\.\d+)?)([KMBT])", re.IGNORECASE)
_LATER = re.compile(r"stage[-_]?(?:[2-9]|\d\d)", re.IGNORECASE)
_STEPS = re.compile(r"(?:step|checkpoint|iter)s?[-_]?(\d+)", re.IGNORECASE)
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# Where a checkpoint says what it was trained on: its file and key, those of the zoo and of transformers.
_RECORDS = (("training.json", "tokens_seen"), ("trainer_state.json", "num_input_tokens_seen"))


@dataclass(frozen=True)
class Checkpoint:
    """One model of a series.

    Attributes:
        series: the training that it is of.
        revision: its name within the series.
        tokens: that it was trained on.
    """

    series: str
    revision: str
    tokens: float


def revision_names(models: dict[str, ModelEntry]) -> dict[str, list[str]]:
    """For each entry with `revisions` the models that it becomes."""
    return {
        name: [f"{name}-{revision}" for revision in entry.revisions]
        for name, entry in models.items()
        if entry.revisions is not None
    }


def expanded(models: dict[str, ModelEntry]) -> dict[str, dict[str, Any]]:
    """The catalogue with a plain entry for each revision, as it would be written."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in models.items():
        own = entry.model_dump(exclude_unset=True, exclude={"revisions", "tokens_per_step"})
        if entry.revisions is None:
            found[name] = own
            continue
        about = entry.revisions
        for key, one in about.items() if isinstance(about, dict) else dict.fromkeys(about).items():
            found[f"{name}-{key}"] = {**own, "series": name, **_of_one(entry, key, one)}
    return found


def _of_one(entry: ModelEntry, key: str, given: RevisionEntry | None) -> dict[str, Any]:
    """What a revision's entry has of its own."""
    given = given or RevisionEntry()
    revision = given.revision or key
    place = (
        {"revision": revision} if entry.hub else {"path": os.path.join(entry.path or "", revision)}
    )
    tokens = given.tokens or _named_tokens(revision, entry.tokens_per_step)
    return {**place, **({} if tokens is None else {"training_tokens": tokens})}


def _named_tokens(name: str, per_step: int | None) -> float | None:
    """Tokens that a revision's name tells; None if it does not."""
    if found := _TOKENS.search(name):
        if _LATER.search(name):
            return None
        return float(found[1]) * _UNITS[found[2].upper()]
    if per_step is not None and (found := _STEPS.search(name) or re.fullmatch(r"(\d+)", name)):
        return float(int(found[1]) * per_step) or None
    return None


def replaced(names: Iterable[str], becomes: dict[str, list[str]]) -> list[str]:
    """Names of models, with all revisions in the place of an entry that has some; each once."""
    return list(dict.fromkeys(one for name in names for one in becomes.get(name, [name])))


def checkpoints(
    models: dict[str, ModelEntry], names: Iterable[str]
) -> Iterator[tuple[str, Checkpoint]]:
    """Of some models those that belong to a series.

    Raises:
        AtlasError: it is not known how many tokens one was trained on.
    """
    for name in names:
        entry = models[name]
        if entry.series is not None:
            revision = name.removeprefix(f"{entry.series}-")
            yield name, Checkpoint(entry.series, revision, _tokens(name, entry))


def _tokens(name: str, entry: ModelEntry) -> float:
    if entry.training_tokens is not None:
        return entry.training_tokens
    if entry.path is not None and not os.path.isdir(entry.path):
        raise AtlasError(
            f"models.{name}: {entry.path}: no such folder, whose training tokens are asked for"
        )
    for file, key in _RECORDS if entry.path is not None else ():
        tokens = _recorded(Path(entry.path or "", file), key)
        if tokens is not None:
            return tokens
    raise AtlasError(
        f"models.{name}: training tokens: not known; give them, as in `revisions: {{step1000: {{tokens: "
        "2.1e+9}}`, or `tokens_per_step` (or, to an entry with `series`, `training_tokens`)"
    )


def _recorded(path: Path, key: str) -> float | None:
    """A number of tokens above 0 in a JSON file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AtlasError(f"{path}: not readable ({error})") from None
    value = content.get(key) if isinstance(content, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return None
    return float(value)
