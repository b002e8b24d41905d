"""What a pass takes of a GPU's memory beside the weights, against what `models/memory.py` expects.

    python benchmarks/passes.py

Random weights and tokens; the peak is torch's own count of bytes that tensors held at once.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memory import FAMILIES
from sparsity_atlas.criteria import create
from sparsity_atlas.lm import forest, forward
from sparsity_atlas.models import working_sizes
from sparsity_atlas.models.counted import Counted
from sparsity_atlas.models.counting import count
from sparsity_atlas.models.memory import MIB, Largest, Sizes, of_a_pass
from sparsity_atlas.models.positions import positions
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.part import measure
from sparsity_atlas.sparsify.attach import Counter, counted, sparsified

# Model type, vocabulary, layers, hidden width, FFN width, heads, key-value heads.
SHAPES = {
    "wide": ("llama", 262_144, 2, 64, 128, 2, 2),
    "135m": ("llama", 49_152, 30, 576, 1536, 9, 3),
    "270m": ("llama", 262_144, 18, 640, 2048, 4, 1),
    "270m-eager": ("gemma2", 262_144, 18, 640, 2048, 4, 1),
    "1b": ("llama", 128_256, 16, 2048, 8192, 32, 8),
}
# Requests, tokens of each, scored of them, tokens that four of them share.
TASKS = {"pages": (16, 2048, 2047, 0), "questions": (64, 160, 20, 120)}


def of_shape(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights."""
    if name in FAMILIES:
        config = AutoConfig.for_model(**FAMILIES[name], initializer_range=0.1)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    kind, vocabulary, layers, hidden, width, heads, groups = SHAPES[name]
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": hidden},
        **{"intermediate_size": width, "num_attention_heads": heads},
        **{"num_key_value_heads": groups, "head_dim": hidden // heads},
        **{"max_position_embeddings": 8192, "initializer_range": 0.1},
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def requests(count: int, length: int, scored: int, shared: int, words: int) -> list[forest.Request]:
    """Random tokens below `words`; every four requests begin alike."""
    draw = random.Random(0)
    begin: list[int] = []
    found = []
    for number in range(count):
        if number % 4 == 0:
            begin = draw.choices(range(5, words), k=shared)
        tokens = begin + draw.choices(range(5, words), k=length + 1 - shared)
        found.append(forest.Request(tokens, scored, number // 4))
    return found


def peak_of(model: PreTrainedModel, counter: Counter, batch: forest.Batch, select: bool) -> int:
    """Bytes that a scored batch takes at most beside what is there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        counter.expect(torch.from_numpy(valid).cuda())
        pieces = forward.logits(
            model, lambda ids, **options: model(ids, **options).logits, batch, select=select
        )
        counts = forward.zeros_by_document(counter.take_unseen()[0], batch)
        scores = forward.scores(pieces, batch)
        counts(), scores()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES | FAMILIES), help="comma-separated")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    for name in arguments.shapes.split(","):
        model = of_shape(name, "cuda", dtype)
        parts = find_parts(model)
        parameters = sum(one.numel() for one in model.parameters())
        sizes = Sizes(parameters=parameters, **measure(parts), **working_sizes.describe(model))
        seen = count(model)
        counted_sizes = replace(sizes, counted=None if seen is None else Counted(**seen))
        print(f"{name:<12}{seen}", flush=True)
        most = positions(model) or max(length for _, length, *_ in TASKS.values())
        for task, (many, length, scored, shared) in TASKS.items():
            length = min(length, most)
            numbers = (many, length, min(scored, length - 1), shared)
            batch = forest.pack(requests(*numbers, min(30_000, sizes.vocabulary)), 16, share=True)[
                0
            ]
            rows, longest = batch.tokens.shape
            pairs = rows * longest**2 if batch.branched else 0
            largest = Largest(rows * longest, longest, len(batch.scored), pairs)
            for site in (None, "intermediate", "all_inputs"):
                attached = (
                    counted(model, parts)
                    if site is None
                    else sparsified(model, parts, site, create({"rule": "topp"}), 0.9)
                )
                with attached as counter:
                    peak = peak_of(model, counter, batch, sizes.pieces)
                named, expected = (
                    of_a_pass(one, largest, dtype.itemsize, "cuda", len(counter.slots))
                    for one in (sizes, counted_sizes)
                )
                print(
                    f"{name:<12}{task:<11}{site or 'dense':<13}{largest.tokens:>7,} tokens   "
                    f"peak {peak // MIB:>7,} MiB   by sizes {named // MIB:>7,} ({named / peak:.2f})   "
                    f"counted {expected // MIB:>7,} ({expected / peak:.2f})",
                    flush=True,
                )
        del model, parts
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
