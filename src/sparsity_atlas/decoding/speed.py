"""Tool `speed`: how long a model's gated FFNs take for a few tokens here, where zeros are left out.

    sparsity-atlas speed results/zoo-large --device cuda --tokens 1 2 4

Weights are random and of the model's shapes: what takes time is how many rows are read, and not what stands
in them. Each site is timed at 0, 10, ... 90 % and at the model's own critical sparsities, by thresholds that
are there beforehand (`fixed`) and by ones that are found at each token (`top-p`). Dense is the better of the
library's products and of our own kernels that drop nothing. Times are results of a machine: nothing
is continued from them, and no other file follows from them.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsity_atlas import cli
from sparsity_atlas.decoding.backend import ACTIVATIONS, MOST_TOKENS
from sparsity_atlas.decoding.maps import SITES, GatedFFN
from sparsity_atlas.decoding.trial import (
    RULES,
    Time,
    dense_ffn,
    layers_of,
    matrix,
    own_ffn,
    realised,
    rules_of,
    timed,
)
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.csv import write_csv
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.terms import AVERAGE

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARES = tuple(round(0.1 * step, 1) for step in range(10))
BAR = 0.99
COLUMNS = ["model", "hidden", "width", "layers", "site", "threshold", "tokens", "sparsity", "of"]
COLUMNS += ["unread_share", "dense_us", "dense_spread_us", "sparse_us", "sparse_spread_us"]
COLUMNS += ["speedup", "ideal_speedup", "realised_share", "pays_from", "copies_bytes"]
COLUMNS += ["dtype", "device", "driver", "torch", "kernels"]


def gated_shapes(manifest: dict[str, Any]) -> dict[tuple[int, int, str], int]:
    """Hidden size, width and activation of a model's plain gated FFNs, and how many layers have them.

    Args:
        manifest: content of model.json.

    Raises:
        AtlasError: it has none, or none whose activation the kernels know.
    """
    counts: dict[tuple[int, int, str], int] = {}
    for entry in manifest["ffn"]:
        # What else is done to its vectors the kernels know nothing of.
        more = {"part", "shaping", "norm"} & set(entry) or "before" in entry["activation"]
        if entry.get("gated") and not more:
            shape = (entry["hidden"], entry["width"], str(entry["activation"]["name"]).lower())
            counts[shape] = counts.get(shape, 0) + 1
    if not counts:
        raise AtlasError(f"{manifest['name']}: has no plain gated FFN, and others are not timed")
    for _, _, activation in counts:
        if activation not in ACTIVATIONS:
            raise AtlasError(
                f"{manifest['name']}: activation: expected {' or '.join(ACTIVATIONS)}, which the kernels "
                f"know, found '{activation}'"
            )
    return counts


def critical_sparsities(curves: Sequence[Path]) -> dict[str, dict[str, float]]:
    """By site the sparsities at which a model's curves cross the headline bar, by what they are.

    Args:
        curves: curve.json files of one model.
    """
    found: dict[str, dict[str, float]] = {}
    for path in curves:
        criterion, site = path.parts[-3:-1]
        for row in read_manifest(path)["critical"]:
            told = row["kind"] != "accuracy" or row["task"] == AVERAGE
            if row["bar"] == BAR and row["value"] is not None and told:
                name = f"{criterion} {row['task']} {row['bar_label']}"
                found.setdefault(site, {})[name] = row["value"]
    return found


def measure(
    shape: tuple[int, int, str],
    critical: dict[str, dict[str, float]],
    dtype: torch.dtype,
    device: str,
    tokens: int,
    cold: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of speed.csv of one kind of FFN, without what is the same in all of them.

    Args:
        shape: hidden size, width, activation.
        critical: as `critical_sparsities` gives it.
        dtype: of weights and vectors.
        device: `cuda` or `cpu`.
        tokens: that are decoded together.
        cold: bytes of weights that a round meets; None: several times the last cache.
    """
    hidden, width, activation = shape
    layers = layers_of(3 * hidden * width, dtype, device, cold)
    factors = [(width, hidden), (width, hidden), (hidden, width)]
    weights = [[matrix(*size, dtype, device) for size in factors] for _ in range(layers)]
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    dense: Time | None = None
    for site in SITES:
        ffns = [GatedFFN(up, gate, down, activation, site) for up, gate, down in weights]
        if dense is None:
            ways = [
                timed([partial(way, x, one) for one in ffns], device)
                for way in (dense_ffn, own_ffn)
            ]
            dense = min(ways)
        copies = sum(one.nbytes for one in ffns[0].transposed.values())
        wanted = [*((share, "") for share in SHARES)]
        wanted += [(share, name) for name, share in critical.get(site, {}).items()]
        for threshold, find in RULES.items():
            rows: list[dict[str, Any]] = []
            for sparsity, of in sorted(wanted):
                made = [rules_of(x, one, site, find, sparsity) for one in ffns]
                calls = [partial(one, x, rules) for one, (rules, _) in zip(ffns, made, strict=True)]
                took = timed(calls, device)
                share = float(np.mean([unread for _, unread in made]))
                rows.append(
                    {
                        **{"site": site, "threshold": threshold, "tokens": tokens},
                        **{"sparsity": sparsity, "of": of, "unread_share": share},
                        **{"dense_us": dense.median, "dense_spread_us": dense.spread},
                        **{"sparse_us": took.median, "sparse_spread_us": took.spread},
                        "speedup": dense.median / took.median,
                        "ideal_speedup": 1 / (1 - share),
                        "realised_share": realised(dense.median, took.median, share),
                        "copies_bytes": copies,
                    }
                )
            pays = pays_from([(row["sparsity"], row["speedup"]) for row in rows])
            yield from ({**row, "pays_from": pays} for row in rows)
        del ffns


def pays_from(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on nothing is slower than dense, on straight lines; None: there is none.

    Args:
        points: sparsity and speed-up, in the order of sparsity.
    """
    beyond: float | None = None
    following: tuple[float, float] | None = None
    for sparsity, speedup in reversed(points):
        if speedup < 1:
            if following is not None:
                at, gain = following
                beyond = sparsity + (1 - speedup) / (gain - speedup) * (at - sparsity)
            return beyond
        beyond, following = sparsity, (sparsity, speedup)
    return beyond


def machine(device: str) -> dict[str, str]:
    """What the times are of."""
    about = {"torch": torch.__version__, "driver": ""}
    library = "numba" if device == "cpu" else "triton"
    try:
        about["kernels"] = f"{library} {version(library)}"
    except PackageNotFoundError:
        raise AtlasError(f"--device: {device}: {library} is not installed") from None
    if device == "cpu":
        threads = torch.get_num_threads()
        named = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
        return {**about, "device": named}
    tool = shutil.which("nvidia-smi")
    if tool:
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"
        asked = [tool, f"--id={torch.cuda.current_device()}", query, "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        about["driver"] = done.stdout.strip()
    return {**about, "device": torch.cuda.get_device_name()}


def main() -> None:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(
        prog="sparsity-atlas speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a model's folder of results, with model.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1],
        help=f"that are decoded together, up to {MOST_TOKENS}",
    )
    parser.add_argument("--output", type=Path, help="CSV file; speed.csv in that folder by default")
    arguments = parser.parse_args()

    for tokens in arguments.tokens:
        if not 1 <= tokens <= MOST_TOKENS:
            raise AtlasError(f"--tokens: expected 1 to {MOST_TOKENS}, found {tokens}")
    if arguments.device == "cpu" and arguments.dtype == "float16":
        raise AtlasError(
            "--dtype: there is no kernel for float16 on a CPU; use bfloat16 or float32"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise AtlasError("--device: cuda: torch sees no CUDA device here")
    torch.manual_seed(0)
    manifest = read_manifest(arguments.model / "model.json")
    critical = critical_sparsities(sorted(arguments.model.glob("*/*/curve.json")))
    common = {"model": manifest["name"], "dtype": arguments.dtype, **machine(arguments.device)}
    rows = []
    for shape, layers in gated_shapes(manifest).items():
        sizes = {"hidden": shape[0], "width": shape[1], "layers": layers}
        for tokens in arguments.tokens:
            dtype = TYPES[arguments.dtype]
            for row in measure(shape, critical, dtype, arguments.device, tokens):
                rows.append({**common, **sizes, **row})
                if row["of"]:
                    cli.logger.info(
                        "%s, %s, %d tokens, %s (%.1f %%): %.2f times as fast as dense",
                        *(row["site"], row["threshold"], tokens, row["of"]),
                        *(100 * row["sparsity"], row["speedup"]),
                    )
    path = arguments.output or arguments.model / "speed.csv"
    write_csv(path, COLUMNS, rows)
    cli.logger.info("%s: %d rows", path, len(rows))
