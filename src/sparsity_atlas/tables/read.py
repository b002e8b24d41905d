"""The run's tables as data frames, for figures and the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import (
    AVERAGE,
    EVERY_PHASE,
    IN_NATS,
    MASKED,
    SPELLED,
    in_every_layer,
    layers_named,
    plain,
    stored,
)

# In figures and tables: the FFN's most tolerant site first, several at once last.
SITE_ORDER = (
    *("intermediate", "input", "gate", "up", "all_inputs"),
    *("qkv_input", "o_input", "all_linear_inputs"),
)
HEADLINE_BAR = 0.99
# Rows that are read at a time.
CHUNK = 200_000
_TEXT = {"model", "criterion", "site", "level", "tensor", "task", "kind", "status", "relation"}
_TEXT |= {"bar_label", "family", "reason", "source", "revision", "architecture", "activation"}
_TEXT |= {
    "dtype",
    "sites",
    "digest",
    "reference",
    "reference_site",
    "allocation",
    "sparsity_of",
    "target_of",
    "part",
}
_TEXT |= {"series", "checkpoint", "law", "activation_law", "over"}
_TEXT |= {"predictor", "node", "reference_site"}
_TEXT |= {"phase", "region", "quantity", "metric", "first", "second", "measure", "label", "note"}
_TEXT |= {"continuation", "before"}
_TEXT |= {"timed", "threshold", "of", "dense_by", "shape", "device", "driver", "versions"}
_FLAGS = {"low_open", "high_open", "non_monotone", "resolved", "paired", "of_activation"}


@dataclass(frozen=True)
class Tables:
    """One frame for each CSV file that `summarize` writes, under the file's name.

    Of experts.csv, which may have millions of rows, those of all tasks together; of curves.csv and layers.csv
    those of all phases.

    Attributes:
        phases: rows of layers.csv for single phases; empty where no node has several.
    """

    critical_sparsity: pd.DataFrame
    curves: pd.DataFrame
    comparison: pd.DataFrame
    twins: pd.DataFrame
    layers: pd.DataFrame
    layer_profile: pd.DataFrame
    metrics: pd.DataFrame
    magnitudes: pd.DataFrame
    output_error: pd.DataFrame
    masks: pd.DataFrame
    prompt_reuse: pd.DataFrame
    inserted: pd.DataFrame
    inserted_gates: pd.DataFrame
    allocation: pd.DataFrame
    sensitivity: pd.DataFrame
    experts: pd.DataFrame
    steps: pd.DataFrame
    scaling: pd.DataFrame
    foretelling: pd.DataFrame
    training: pd.DataFrame
    training_fits: pd.DataFrame
    training_limits: pd.DataFrame
    truthfulness: pd.DataFrame
    speed: pd.DataFrame
    models: pd.DataFrame
    failures: pd.DataFrame
    phases: pd.DataFrame

    def of(self, model: str) -> Tables:
        """The rows of one model; `scaling`, which has no models, becomes empty."""
        kept = {}
        for one in fields(self):
            frame = getattr(self, one.name)
            kept[one.name] = frame[frame["model"] == model] if "model" in frame else frame[:0]
        return replace(self, **kept)

    def without_single_layers(self) -> Tables:
        """Without the rows of curves whose site is confined to one layer."""
        kept = {}
        for one in fields(self):
            frame = getattr(self, one.name)
            if "site" in frame:
                frame = frame.drop(index=of_single_layers(frame).index)
            kept[one.name] = frame
        return replace(self, **kept)

    def criteria(self) -> list[str]:
        """Criteria of the run, in its own order."""
        # What the store alone tells is there before any curve is.
        named = pd.concat([self.curves["criterion"], self.output_error["criterion"]])
        return list(named.unique())

    def by_size(self) -> list[str]:
        """Models, the smallest first."""
        return list(self.models.sort_values(size_column(self.models), kind="stable")["model"])

    def earlier(self) -> set[str]:
        """Checkpoints of trainings, but for the last one of each, which stands for it among models."""
        if "series" not in self.models:
            return set()
        rows = self.models[self.models["series"] != ""]
        last = rows.sort_values("training_tokens", kind="stable").drop_duplicates(
            "series", keep="last"
        )
        return set(rows["model"]) - set(last["model"])

    def loss_task(self) -> str | None:
        """The task that the headline is read from: the first one with a loss, or a bound of one."""
        rows = self.critical_sparsity
        losses = rows[rows["kind"].isin(IN_NATS)]["task"]
        return None if losses.empty else losses.iloc[0]

    def headline(self, task: str | None) -> pd.DataFrame:
        """Rows of critical_sparsity.csv of a task at the headline bar."""
        rows = self.critical_sparsity
        return rows[(rows["task"] == task) & (rows["bar"] == HEADLINE_BAR)]


# Stems of the files; `phases` is a part of one.
FILES = tuple(one.name for one in fields(Tables) if one.name != "phases")


def size_column(rows: pd.DataFrame) -> str:
    """What models are compared by: non-embedding parameters, where some are mixtures the active ones."""
    active = "active_non_embedding_parameters"
    return active if active in rows else "non_embedding_parameters"


def records(rows: pd.DataFrame) -> Iterator[Any]:
    """The rows, with a cell for an attribute: pandas does not say what a column holds."""
    return iter(rows.itertuples())


def in_order(found: Iterable[str]) -> list[str]:
    """The sites among some names, each once, in the order in which they are shown."""
    return sorted((name for name in set(found) if plain(name) in SITE_ORDER), key=site_rank)


def site_rank(site: str) -> tuple[int, int, tuple[int, ...]]:
    """Where a site as paths spell it stands among others: confined to parts, layers, behind the plain one."""
    return SITE_ORDER.index(plain(site)), SPELLED.index(in_every_layer(site)), layers_named(site)


def tensor_rank(tensor: str) -> tuple[int, int]:
    """Where a tensor that is masked stands among others: as the sites; of one map, before that of several."""
    return SITE_ORDER.index(stored(tensor)), MASKED.index(tensor)


def of_single_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of curves whose site is confined to one layer: they are shown against their layer."""
    return rows[rows["site"].map(lambda site: len(layers_named(site)) == 1).astype(bool)]


def read_csv(path: Path, task: str | None = None) -> pd.DataFrame:
    """Read one of our tables; names stay text whatever they look like.

    Args:
        path: the file.
        task: whose rows are read; None: all.

    Raises:
        AtlasError: it is missing or damaged.
    """
    try:
        with pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=CHUNK) as chunks:
            # An empty table is one chunk without rows.
            kept = [one if task is None else one[one["task"] == task] for one in chunks]
        frame = pd.concat(kept, ignore_index=True)
    except FileNotFoundError:
        raise AtlasError(f"{path}: no such file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise AtlasError(f"{path}: not a table ({error}); delete it and run again") from None
    for column in frame.columns:
        if column in _FLAGS:
            frame[column] = frame[column] == "true"
        elif column not in _TEXT:
            frame[column] = pd.to_numeric(frame[column].replace("", None))
    return frame


def read_tables(paths: Sequence[Path]) -> Tables:
    """Read the tables among some files.

    Raises:
        AtlasError: one of them is not given, missing or damaged.
    """
    given = {path.stem: path for path in paths}
    missing = [name for name in FILES if name not in given]
    if missing:
        raise AtlasError(f"tables: expected {missing[0]}.csv, found {', '.join(given) or 'none'}")
    tasks = {"experts": AVERAGE}
    read = {name: read_csv(given[name], tasks.get(name)) for name in FILES}
    single = {name: read[name]["phase"] != EVERY_PHASE for name in ("curves", "layers")}
    phases = read["layers"][single["layers"]]
    return Tables(**read | {name: read[name][~one] for name, one in single.items()}, phases=phases)
