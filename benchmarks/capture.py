"""Capture against the forward pass alone and against the disk's own speed.

    python benchmarks/capture.py --device cpu --folder /tmp

A random Llama is captured at all sites. The disk's speed is that of plain files with the same bytes, one for
each chunk, as the system takes them (no fsync, which the store does not do either).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from measure import machine
from sparsity_atlas.activations.capture import capture
from sparsity_atlas.activations.layout import groups
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models import working_sizes
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.find import bind_parts, describe_parts, find_parts, observe
from sparsity_atlas.sites.part import measure

TENSORS = ["gate", "input", "intermediate", "up"]


def save(folder: Path, layers: int, hidden: int) -> dict[str, Any]:
    """Write a model; returns what capture reads of its manifest."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    # Loading asks for one; nothing is tokenised here.
    (folder / "tokenizer.json").write_text("{}")
    parts = find_parts(model)
    return {
        **{"parameters": count_parameters(model), "memory": working_sizes.describe(model)},
        **{**measure(parts), "ffn": describe_parts(parts)},
    }


def forward_alone(
    folder: Path, manifest: dict[str, Any], ids: np.ndarray, settings: dict[str, Any]
) -> float:
    """Seconds of the same passes, with hooks that keep nothing."""
    model = load(Checkpoint(folder), dtype=settings["dtype"], device=settings["device"])
    batch = settings["batch_size"]
    parts = bind_parts(model, manifest["ffn"])
    with torch.no_grad(), observe(parts, TENSORS, lambda _: None):
        for warm in (True, False):
            start = time.perf_counter()
            for first in range(0, batch if warm else len(ids), batch):
                rows = torch.from_numpy(ids[first : first + batch]).to(model.device)
                model(input_ids=rows, use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_files(folder: Path, store: ActivationStore) -> tuple[float, int]:
    """Seconds to write the captured chunks as plain files, and their bytes."""
    folder.mkdir()
    written, spent = 0, 0.0
    for name in TENSORS:
        for layer in store.layers(name):
            array = store.root[name][f"layer_{layer:03d}"]
            for start in range(0, array.shape[0], array.chunks[0]):
                chunk = np.asarray(array[start : start + array.chunks[0]])
                begin = time.perf_counter()
                chunk.tofile(folder / f"{name}-{layer}-{start}")
                spent += time.perf_counter() - begin
                written += chunk.nbytes
    return spent, written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    print(machine(arguments.device))
    settings = {
        "dtype": "float32" if arguments.device == "cpu" else "bfloat16",
        "device": arguments.device,
        "batch_size": 8,
        "tokens": arguments.tokens,
    }
    ids = np.random.default_rng(0).integers(0, 4096, (arguments.tokens // 256, 256))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        manifest = save(folder / "model", arguments.layers, arguments.hidden)
        times: dict[str, list[float]] = {"forward": [], "capture": [], "disk": []}
        for repeat in range(arguments.repeats):
            alone = forward_alone(folder / "model", manifest, ids, settings)
            store = folder / f"{repeat}.zarr"
            start = time.perf_counter()
            load(Checkpoint(folder / "model"), dtype=settings["dtype"], device=settings["device"])
            loading = time.perf_counter() - start
            start = time.perf_counter()
            missing = groups(manifest["ffn"], TENSORS)
            capture(store, manifest, Checkpoint(folder / "model"), ids, missing, "all", settings)
            times["capture"].append(time.perf_counter() - start - loading)
            times["forward"].append(alone)
            spent, size = plain_files(folder / f"plain-{repeat}", ActivationStore(store))
            times["disk"].append(spent)
    best = {key: min(values) for key, values in times.items()}
    print(f"{size / 2**20:,.0f} MiB, best of {arguments.repeats}")
    for key, value in best.items():
        print(f"{key:<8} {value:7.2f} s  {size / 2**20 / value:7.0f} MiB/s")
    slowest = max(best["forward"], best["disk"])
    print(f"capture takes {best['capture'] / slowest:.2f} of the slower of the two")
    print(f"(one after the other they would take {sum(best.values()) - best['capture']:.2f} s)")


if __name__ == "__main__":
    main()
