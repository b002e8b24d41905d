"""Stage `output_error`: induced sparsity and output error at every level, from the store.

No forward pass of the model: each layer's captured input goes through that layer's FFN alone. At an input of
the attention's maps the output is theirs; at all linear inputs at once the error is the mean of the three.
How the masks of a sequence's tokens go together is counted on the way, see `token_masks`. Where it is asked
for, forward passes follow that tell what a prompt's mask is worth behind it, see `prompt_reuse`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.sources import given, reader, source_names
from sparsity_atlas.activations.store import ActivationStore, read_ahead
from sparsity_atlas.criteria import check_level, create
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.level_arguments import add_levels, levels_of
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.models.memory import ERROR_BLOCK
from sparsity_atlas.progress import told
from sparsity_atlas.studies.sparse_output import Output, outputs_at, relative, sparse_output
from sparsity_atlas.terms import CAUSAL, KINDS, NAMED_PARTS, PlaceKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import Place, State
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.studies.token_masks import MaskTables

_TARGET = [
    ("tensor", pa.string()),
    ("of", pa.string()),
    ("target", pa.float64()),
    ("reached", pa.float64()),
]
SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("layer", pa.int64()),
        ("sparsity", pa.float64()),  # zeros / entries at the site
        ("error", pa.float64()),  # mean over tokens of ‖f(x) − f_sparse(x)‖ / ‖f(x)‖
        # Of a calibrated criterion: what the level asks of each tensor, and what that got in calibration.
        ("targets", pa.list_(pa.struct(_TARGET))),
    ]
)
# Of a mixture further the parts of each layer, by themselves, and of what is asked of a tensor whose it is.
_PART = pa.struct([("part", pa.string()), ("sparsity", pa.float64()), ("error", pa.float64())])
SCHEMA_OF_PARTS = pa.schema(
    [
        *(field for field in SCHEMA if field.name != "targets"),
        ("targets", pa.list_(pa.struct([*_TARGET, ("part", pa.string())]))),
        ("parts", pa.list_(_PART)),
    ]
)
SCHEMAS = (SCHEMA, SCHEMA_OF_PARTS)


def layer_rows(
    parts: Sequence[Part],
    store: ActivationStore,
    site: str,
    rules: Mapping[PlaceKey, Criterion],
    levels: list[str],
    first: int = 0,
    masks: MaskTables | None = None,
) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for the parts of one layer, a block of tokens at a time, from the token `first` on.

    `masks` counts the masks of each level, and what is exactly zero.
    """
    layer = parts[0].layer
    ids = store.ids()
    length = ids.shape[1]
    widest = max(part.size(tensor) for part in parts for tensor in part.tensors)
    step = max(1, ERROR_BLOCK // (4 * widest * length)) * length
    changed = outputs_at(parts, site)
    sums = {(level, output): _Sums() for level in levels for output in changed}

    def exact(vectors: Vectors, onto: Tensor) -> None:
        if masks is not None and vectors.part.rows_are_tokens(vectors.tensor):
            masks.add_exact(vectors.key, vectors.values.view(-1, length, vectors.values.shape[-1]))

    for output in changed:
        places = [slice(start, start + step) for start in range(first, ids.size, step)]
        for _, block in read_ahead(reader(store, *output), places):
            own = given(block, output.part)
            dense = output.part.run(own, output.site, None if masks is None else exact)
            for level in levels:
                look = None if masks is None else partial(masks.add, level)
                made, zeros, entries = sparse_output(output, own, rules, float(level), length, look)
                error, count = relative(dense, made)
                sums[level, output].add(zeros, entries, error, count)
    return [
        {
            **{"level": level, "layer": layer},
            **_together([sums[level, one] for one in changed]),
            "parts": [
                {"part": name, **_together([sums[level, one] for one in outputs])}
                for name, outputs in _by_part(changed).items()
            ],
        }
        for level in levels
    ]


@dataclass
class _Sums:
    """Of one output at one level: zeros and entries at the site, errors and how many."""

    zeros: int = 0
    entries: int = 0
    error: float = 0.0
    count: int = 0

    def add(self, zeros: int, entries: int, error: float, count: int) -> None:
        self.zeros += zeros
        self.entries += entries
        self.error += error
        self.count += count


def _together(outputs: list[_Sums]) -> dict[str, float | None]:
    """Share of zeros of some outputs of a layer, and the mean of their mean errors.

    No error where an output is infinite, or there is none: that level fails in the evaluation, too.
    """
    sparsity = sum(one.zeros for one in outputs) / sum(one.entries for one in outputs)
    if not all(one.count and math.isfinite(one.error) for one in outputs):
        return {"sparsity": sparsity, "error": None}
    return {
        "sparsity": sparsity,
        "error": sum(one.error / one.count for one in outputs) / len(outputs),
    }


def _by_part(outputs: Iterable[Output]) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {}
    for one in outputs:
        found.setdefault(one.part.name, []).append(one)
    return found


def targets(
    criterion: Criterion, places: Sequence[Place], states: Mapping[str, State], level: str
) -> list[dict[str, Any]]:
    """What a level asks of each tensor of a layer, and what that got in calibration; see `SCHEMA`."""
    from sparsity_atlas.criteria.place import state_name

    return [
        {"tensor": place.tensor, "part": place.part.name, **found._asdict()}
        for place in places
        if (found := criterion.reach(states.get(state_name(place.key), {}), float(level)))
        is not None
    ]


def schema_of(parts: Iterable[Part]) -> pa.Schema:
    """Columns of a model's table: `SCHEMA`, and `parts` where a tensor's name does not tell its part."""
    return SCHEMA_OF_PARTS if any(part.name in NAMED_PARTS for part in parts) else SCHEMA


@dataclass(frozen=True)
class Study:
    """What is looked at in the activations of a model.

    Attributes:
        criterion: the rule.
        levels: its levels, as paths spell them.
        parts: of all layers.
        site: of the parts.
        states: of the criterion's calibration.
        store: the activations.
        first: token from which on they are looked at; those before it calibrated the criterion.
    """

    criterion: Criterion
    levels: list[str]
    parts: list[Part]
    site: str
    states: Mapping[str, State]
    store: ActivationStore
    first: int

    def check_sources(self) -> None:
        """See that the store has all that outputs are made of.

        Raises:
            AtlasError: it has not.
        """
        outputs = outputs_at(self.parts, self.site)
        for tensor in sorted({name for one in outputs for name in source_names(*one)}):
            self.store.check(tensor)

    def rows(self, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], MaskTables]:
        """Rows of `SCHEMA` for all layers, and what was counted of the masks on the way.

        Args:
            settings: which further studies are made of a layer.
        """
        from sparsity_atlas.criteria.binding import bind_all
        from sparsity_atlas.criteria.place import places
        from sparsity_atlas.sites.part import by_layer
        from sparsity_atlas.studies.token_masks import MaskTables

        rows: list[dict[str, Any]] = []
        masks = MaskTables(self.store.ids().shape[1], settings.get("coactivation", 0))
        layers = list(by_layer(self.parts).values())
        # Of what is asked of prompts beside, a share of the layers says little.
        for layer in layers if settings.get("prompt_reuse") else told(layers, "measured", "layers"):
            there = list(places(layer, self.site))
            if not there:  # a layer without such a part
                continue
            rules = bind_all(self.criterion, layer, self.site, self.states)
            found = layer_rows(layer, self.store, self.site, rules, self.levels, self.first, masks)
            rows += [
                {**row, "targets": targets(self.criterion, there, self.states, row["level"])}
                for row in found
            ]
            self._look_further(layer, there, rules, settings, masks)
        return rows, masks

    def _look_further(
        self,
        layer: Sequence[Part],
        there: Sequence[Place],
        rules: Mapping[PlaceKey, Criterion],
        settings: dict[str, Any],
        masks: MaskTables,
    ) -> None:
        """Add what else is asked of a layer's dense FFNs: CETT, and what foretells their masks."""
        from sparsity_atlas.sites.ffn import FFN
        from sparsity_atlas.studies.cett_at import cett_rows
        from sparsity_atlas.studies.mask_predictors import PREDICTABLE, predictor_rows

        ffns = [part for part in layer if isinstance(part, FFN)]
        for ffn in ffns if settings.get("cett") and self.site == "intermediate" else ():
            key = PlaceKey(ffn.layer, ffn.name, self.site)
            masks.extend(key, cett_rows(ffn, self.store, settings["cett"], self.first))
        for place in there if settings.get("predictors") and self.site in PREDICTABLE else ():
            for ffn in (one for one in ffns if one.name == place.part.name):
                asked = (settings["predictors"], self.levels, self.first)
                made = predictor_rows(ffn, self.store, self.site, rules[place.key], *asked)
                masks.extend(place.key, made)


def _arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas output_error", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True)
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    add_levels(parser)
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument(
        "--settings",
        required=True,
        type=json.loads,
        help="JSON: model loading, calibration tokens (these are left out)",
    )
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    parser.add_argument(
        "--masks", type=Path, help="Parquet file of the masks; unset: masks.parquet beside it"
    )
    parser.add_argument(
        "--reuse", type=Path, help="of prompts' masks; unset: prompt_reuse.parquet beside it"
    )
    return parser.parse_args()


def main() -> None:
    """Command line of the stage."""
    arguments = _arguments()
    criterion = create(arguments.criterion)
    levels = levels_of(arguments)
    for level in levels:
        check_level(criterion, level)
    manifest, checkpoint = from_manifest(arguments.model, kinds=KINDS)
    import torch

    from sparsity_atlas.sites.available import Available
    from sparsity_atlas.sites.find import bind_parts
    from sparsity_atlas.sites.part import chosen
    from sparsity_atlas.studies.prompt_reuse import reuse_table

    Available.in_manifest(manifest).check(manifest["name"], arguments.site)

    settings = arguments.settings
    model = load(checkpoint, **how(settings))
    store = ActivationStore(arguments.store)
    states = read_calibration(arguments.calibration).states if arguments.calibration else {}
    parts, site = chosen(bind_parts(model, manifest["ffn"]), arguments.site)
    first = settings.get("calibration_tokens", 0)
    study = Study(criterion, levels, parts, site, states, store, first)
    study.check_sources()
    with torch.no_grad():
        rows, masks = study.rows(settings)
    if manifest["kind"] != CAUSAL:  # nothing follows its prompts
        settings = {**settings, "prompt_reuse": None}
    ids = store.ids()
    ids = ids[first // ids.shape[1] :]
    reuse = reuse_table(criterion, parts, site, states, levels, ids, settings)
    beside = arguments.output.with_name
    write_parquet(arguments.masks or beside("masks.parquet"), masks.table())
    write_parquet(arguments.reuse or beside("prompt_reuse.parquet"), reuse)
    write_parquet(arguments.output, pa.Table.from_pylist(rows, schema_of(parts)))
