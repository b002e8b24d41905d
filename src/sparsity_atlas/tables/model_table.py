"""Rows of models.csv: what each model of a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.terms import CAUSAL

SIZES = ["parameters", "non_embedding_parameters", "layers"]
ACTIVE = ["active_parameters", "active_non_embedding_parameters"]
MODELS = [
    "model",
    "source",
    "revision",
    "architecture",
    "kind",
    "activation",
    "family",
    "dtype",
    *SIZES,
]
MODELS += ["hidden", "width", "sites", "digest"]
# Further columns where models are checkpoints of a training.
CHECKPOINT = ["series", "checkpoint", "training_tokens"]


def model_sizes(paths: list[Path]) -> dict[str, dict[str, int]]:
    """Sizes of each model, by its folder's name; where one is a mixture of experts the active ones, too."""
    sizes = {}
    counts = {path.parent.name: read_manifest(path) for path in paths}
    mixtures = any("active" in one["parameters"] for one in counts.values())
    for model, manifest in counts.items():
        found = manifest["parameters"]
        sizes[model] = {
            "parameters": found["total"],
            "non_embedding_parameters": found["non_embedding"],
            "layers": manifest["layers"],
        }
        if mixtures:
            # Of a dense model they are all of them.
            own = found.get("active", found["total"])
            sizes[model]["active_parameters"] = own
            own = found.get("active_non_embedding", found["non_embedding"])
            sizes[model]["active_non_embedding_parameters"] = own
    return sizes


def earlier(checkpoints: Mapping[str, Checkpoint]) -> set[str]:
    """The models that are a training's checkpoints, but for the last one of each, which stands for it."""
    last: dict[str, str] = {}
    for model, one in checkpoints.items():
        other = last.get(one.series)
        if other is None or checkpoints[other].tokens <= one.tokens:
            last[one.series] = model
    return set(checkpoints) - set(last.values())


def model_rows(
    paths: list[Path], checkpoints: Mapping[str, Checkpoint] | None = None
) -> list[dict[str, Any]]:
    """Rows of models.csv. A family shares its architecture, its activation, and whether it is causal.

    Args:
        paths: manifests.
        checkpoints: those models that are one of a training.
    """
    sizes = model_sizes(paths)
    rows = []
    for path in paths:
        manifest = read_manifest(path)
        source = manifest["source"]
        trained = (checkpoints or {}).get(path.parent.name)
        rows.append(
            {
                **dict.fromkeys(CHECKPOINT),
                **(dict(zip(CHECKPOINT, astuple(trained), strict=True)) if trained else {}),
                **{key: manifest[key] for key in MODELS if key in manifest},
                **sizes[path.parent.name],
                "model": path.parent.name,
                "source": source.get("hub") or source["path"],
                "family": _family(manifest),
                "sites": " ".join(manifest["sites"]),
            }
        )
    return rows


def _family(manifest: dict[str, Any]) -> str:
    kind = manifest.get("kind", CAUSAL)
    named = [manifest["architecture"], manifest["activation"], *([kind] if kind != CAUSAL else [])]
    return ", ".join(named)
