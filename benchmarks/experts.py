"""A forward pass with a criterion inside experts over the dense one, and a loop with a hook an expert.

    python benchmarks/experts.py --device cuda
    python benchmarks/experts.py --device cpu --models tiny

Models have all layers, experts and the vocabulary of a real one, in bfloat16, and random weights; those of
the experts have heavy tails, so that activations have them too. The largest takes 14 GB, and 4 GB for what it
computes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

from measure import machine, official, seconds
from sparsity_atlas import kernels
from sparsity_atlas.criteria.built_in.topp import TopP
from sparsity_atlas.sites.experts.implementation import chosen
from sparsity_atlas.sites.find import Part, bind_parts
from sparsity_atlas.sparsify.attach import sparsified

# Layers, hidden width, width of an expert, experts, of which each token meets, heads, vocabulary.
SHAPES = {
    "olmoe-1b-7b": (16, 2048, 1024, 64, 8, 16, 50304),
    "tiny": (2, 256, 128, 8, 2, 8, 1000),
}
SITES = ("intermediate", "input")
DEFAULT, ONE_TOKEN, LOOP = "grouped_mm", "batched_mm", "loop_with_hooks"
PASSES = 5  # timed in a row

Pass = Callable[[], object]
Attach = Callable[[], contextlib.AbstractContextManager]


def make(name: str, device: str) -> tuple[OlmoeForCausalLM, list[Part]]:
    """A model of a shape, with its experts."""
    layers, hidden, width, experts, active, heads, vocabulary = SHAPES[name]
    config = OlmoeConfig(
        vocab_size=vocabulary,
        eos_token_id=None,
        pad_token_id=None,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=active,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for block in model.model.layers:
        # Each channel has a scale of its own, log-normal.
        weight = block.mlp.experts.gate_up_proj.data
        scale = torch.exp(torch.randn(*weight.shape[:2], 1, device=device))
        weight.normal_().mul_(scale / hidden**0.5)
    entry = {"count": experts, "each": active, "hidden": hidden, "width": width, "gating": None}
    place = "model.layers.{}.mlp.experts".format
    return model, bind_parts(
        model,
        # The gate's factors are not needed at these sites.
        [
            {"layer": layer, "part": "experts", "path": place(layer), **entry}
            for layer in range(layers)
        ],
    )


def loop_with_hooks(level: float) -> Callable[..., Tensor]:
    """Experts as the paper's code runs them: one after another, a hook before each one's down projection."""

    def run(self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        hit = F.one_hot(top_k_index, self.num_experts).permute(2, 1, 0)
        for expert in range(self.num_experts):
            order, tokens = torch.where(hit[expert])
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            i = self.act_fn(gate) * up
            i, _ = official(i, level)
            y = F.linear(i, self.down_proj[expert]) * top_k_weights[tokens, order, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    return run


class Timer:
    """Times passes of one model over one batch.

    Args:
        model: the model.
        ids: [batch, tokens].
        device: where both are.
        times: passes in a row.
    """

    def __init__(self, model: nn.Module, ids: Tensor, device: str, times: int) -> None:
        self.model, self.ids, self.device, self.times = model, ids, device, times
        self.valid = torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, attach: Attach) -> float:
        """Seconds of a pass with something attached; a counter that it yields counts."""
        with attach() as counter:

            def once() -> None:
                if counter is not None:
                    counter.expect(self.valid)
                self.model(input_ids=self.ids, use_cache=False)
                if counter is not None:
                    counter.take()
                elif self.device == "cuda":
                    # As an evaluation does with each batch, and `take` does too.
                    torch.cuda.synchronize()

            return seconds(once, self.device, self.times)

    def in_turns(self, dense: Attach, other: Attach, rounds: int) -> list[tuple[float, float]]:
        """In turns: a machine's clock changes by more than a criterion costs."""
        return [(self(dense), self(other)) for _ in range(rounds)]

    @torch.no_grad()
    def sparsity(self, attach: Attach) -> float:
        """Induced sparsity of one pass."""
        with attach() as counter:
            counter.expect(self.valid)
            self.model(input_ids=self.ids, use_cache=False)
            entries = self.valid.numel() * sum(slot.width for slot in counter.slots)
            return int(counter.take()[0].sum()) / entries


def ratio(pairs: list[tuple[float, float]]) -> str:
    """Median and spread of the second over the first."""
    ratios = sorted(other / dense for dense, other in pairs)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def measure(name: str, device: str, level: float, batch: int, tokens: int, rounds: int) -> None:
    """Print one model's tables."""
    start = time.perf_counter()
    model, parts = make(name, device)
    made = time.perf_counter() - start
    before = model.get_experts_implementation()
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
    ExpertsInterface.register(LOOP, loop_with_hooks(level))
    dense = partial(chosen, model, DEFAULT)

    def ours(site: str) -> Attach:
        return partial(sparsified, model, parts, site, TopP(), level)

    whole = Timer(model, ids, device, PASSES)
    print(
        f"{name}: {len(parts)} layers of experts, {before}, made in "
        f"{made:.1f} s; dense {whole(dense) * 1e3:.1f} ms"
    )
    for site in SITES:
        pairs = whole.in_turns(dense, ours(site), rounds)
        added = statistics.median(other - one for one, other in pairs) / len(parts)
        print(
            f"  {site:<12} {whole.sparsity(ours(site)):4.0%} sparse | ours {ratio(pairs)} × dense, "
            f"{1e3 * added:.3f} ms a layer",
            flush=True,
        )

    # One token a row, in an empty context: what a step of generation asks of the experts.
    step = Timer(model, ids[:8, :1], device, 4 * PASSES)
    for other in (DEFAULT, ONE_TOKEN):
        for site in SITES:
            pairs = step.in_turns(partial(chosen, model, other), ours(site), rounds)
            median = statistics.median(one for one, _ in pairs)
            print(
                f"  one token, {len(step.ids)} rows, {site:<12} | ours {ratio(pairs)} × dense "
                f"{other} ({median * 1e3:.2f} ms)",
                flush=True,
            )

    single = Timer(model, ids[:1], device, 1)
    looped = single(partial(chosen, model, LOOP))
    alone, together = single(ours("intermediate")), whole(ours("intermediate"))
    print(
        f"  a loop over experts with a hook each, batch 1: {looped * 1e3:.0f} ms a sequence; ours at "
        f"batch 1 {alone * 1e3:.1f} ms ({looped / alone:.1f} times as fast), at batch {batch} "
        f"{together / batch * 1e3:.2f} ms ({looped * batch / together:.0f} times as fast)",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--models", default="olmoe-1b-7b", help="comma-separated")
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="of the dense pass and ours in turns")
    arguments = parser.parse_args()

    os.environ[kernels.VARIABLE] = "compiled"
    print(f"{machine(arguments.device)}, transformers {transformers.__version__}")
    print(
        f"top-p, p = {arguments.level:g}; {arguments.batch} × {arguments.tokens} tokens; bfloat16"
    )
    for name in arguments.models.split(","):
        measure(
            *(name, arguments.device, arguments.level),
            *(arguments.batch, arguments.tokens, arguments.rounds),
        )


if __name__ == "__main__":
    main()
