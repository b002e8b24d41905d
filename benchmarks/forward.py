"""A forward pass with a criterion at a site, over the dense one: ours and the official algorithm's.

    python benchmarks/forward.py --device cuda
    python benchmarks/forward.py --device cpu --models tiny

Models have all layers and the vocabulary of a real one, in bfloat16, and random weights; those of the FFN
have heavy tails, so that activations have them too. The largest takes 17 GB, and 5 GB for what it computes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from measure import machine, official, seconds
from sparsity_atlas import kernels
from sparsity_atlas.criteria.built_in.topp import TopP
from sparsity_atlas.sites.find import Part, Vectors, bind_parts, intercept
from sparsity_atlas.sparsify.attach import sparsified

# Layers, hidden width, FFN width, heads, key-value heads, width of a head, vocabulary, activation.
SHAPES = {
    "llama-1b": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, "silu"),
    "llama-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, "silu"),
    "gemma-4b": ("gemma3_text", 34, 2560, 10240, 8, 4, 256, 262208, "gelu_pytorch_tanh"),
    "tiny": ("llama", 2, 512, 2048, 8, 4, 64, 1000, "silu"),
}
SITES = ("intermediate", "input")
PASSES = 5  # timed in a row


def make(name: str, device: str) -> tuple[nn.Module, list[Part]]:
    """A model of a shape, with its FFNs."""
    kind, layers, hidden, width, heads, groups, head, vocabulary, activation = SHAPES[name]
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        tie_word_embeddings=name != "llama-8b",
        **{"hidden_activation" if kind.startswith("gemma") else "hidden_act": activation},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for block in model.model.layers:
        for linear in (block.mlp.up_proj, block.mlp.gate_proj):
            # Each channel has a scale of its own, log-normal.
            scale = torch.exp(torch.randn(linear.out_features, 1, device=device))
            normal = torch.randn(linear.weight.shape, device=device) / linear.in_features**0.5
            linear.weight.data.copy_(normal * scale)
    place = "model.layers.{}.mlp.{}".format
    return model, bind_parts(
        model,
        [
            {
                "layer": layer,
                "hidden": hidden,
                "width": width,
                "gated": True,
                "up": {"module": place(layer, "up_proj"), "half": None},
                "gate": {"module": place(layer, "gate_proj"), "half": None},
                "activation": {"name": activation, "module": None, "shared": False},
                "down": {"module": place(layer, "down_proj"), "half": None},
                "overwritten": False,
            }
            for layer in range(layers)
        ],
    )


def measure(name: str, device: str, level: float, batch: int, tokens: int, rounds: int) -> None:
    """Print one model's table."""
    model, parts = make(name, device)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
    valid = torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def timed(
        attach: Callable[[], contextlib.AbstractContextManager], times: int = PASSES
    ) -> float:
        with attach() as counter:

            def once() -> None:
                if counter is not None:
                    counter.expect(valid)
                model(input_ids=ids, use_cache=False)
                if counter is not None:
                    counter.take()
                elif device == "cuda":
                    # As an evaluation does with each batch, and `take` does too.
                    torch.cuda.synchronize()

            return seconds(once, device, times)

    def theirs(vectors: Vectors, onto: Tensor) -> Tensor:
        return official(vectors.values, level)[0]

    print(f"{name}: {len(parts)} layers, dense {timed(contextlib.nullcontext) * 1e3:.1f} ms")
    for site in SITES:
        with torch.no_grad(), sparsified(model, parts, site, TopP(), level) as counter:
            counter.expect(valid)
            model(input_ids=ids, use_cache=False)
            entries = valid.numel() * sum(slot.width for slot in counter.slots)
            sparsity = counter.take()[0].sum() / entries
        # In turns: a machine's clock changes by more than a criterion costs.
        pairs = [
            (
                timed(contextlib.nullcontext),
                timed(partial(sparsified, model, parts, site, TopP(), level)),
            )
            for _ in range(rounds)
        ]
        ratios = sorted(ours / dense for dense, ours in pairs)
        added = statistics.median(ours - dense for dense, ours in pairs) / len(parts)
        paper = timed(partial(intercept, parts, site, theirs), 3) / pairs[-1][0]
        print(
            f"  {site:<12} {sparsity:4.0%} sparse | ours {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}) × dense, {1e3 * added:.3f} ms a layer | "
            f"official {paper:.2f} × dense"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--models", default="llama-1b,llama-8b,gemma-4b", help="comma-separated")
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="of the dense pass and ours in turns")
    arguments = parser.parse_args()

    os.environ[kernels.VARIABLE] = "compiled"
    print(machine(arguments.device))
    print(
        f"top-p, p = {arguments.level:g}; {arguments.batch} × {arguments.tokens} tokens; bfloat16"
    )
    for name in arguments.models.split(","):
        measure(
            *(name, arguments.device, arguments.level),
            *(arguments.batch, arguments.tokens, arguments.rounds),
        )
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
