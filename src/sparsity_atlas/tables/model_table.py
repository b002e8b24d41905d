"""Rows of models.csv: what each model of a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def model_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows of models.csv. A family shares its architecture, its activation, and whether it is causal."""
    sizes = model_sizes(paths)
    rows = []
    for path in paths:
        manifest = read_manifest(path)
        source = manifest["source"]
        rows.append(
            {
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
