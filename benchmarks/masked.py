"""A masked-diffusion model's bounds and texts over bare forward passes of the same batches.

    python benchmarks/masked.py --device cuda
    python benchmarks/masked.py --device cpu --models tiny

The model has all layers and the vocabulary of Llama 3.2 1B, bfloat16 and random weights. Bare passes are the
model's own over the same rows one after the other, with logits where they are wanted and nothing else: no
criterion, no counts, nothing read. Each is run dense and with top-p at `intermediate`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama import SHAPES, random_llama
from measure import machine
from sparsity_atlas.criteria.built_in.topp import TopP
from sparsity_atlas.lm import journalled
from sparsity_atlas.lm.by_kind import language_model
from sparsity_atlas.lm.masked.passes import Passes
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import counted, sparsified

MASK, EOS = 5, 2
# Questions of 100 to 140 tokens with four options of 3 to 12 each, by 32 sets of masks at most.
QUESTIONS, SAMPLES = 24, 32
# Texts of 128 tokens behind prompts of 100 to 140, four tokens a step, in one block.
PROMPTS, WRITTEN, STEPS = 32, 128, 32


class Memory:
    """What finished batches left, for as long as the process."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        self.records.append(record)


class Bench:
    """A model, and what it is asked.

    Args:
        name: of its shape.
        device: where it is.
    """

    def __init__(self, name: str, device: str) -> None:
        self.model = random_llama(
            *(name, device, torch.bfloat16),
            **{"max_position_embeddings": 2048, "is_causal": False},
            **{"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0},
        )
        vocabulary = self.model.config.vocab_size
        self.parts = find_parts(self.model)
        words = {f"w{number}": number for number in range(vocabulary)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
            **{"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"},
        )
        about = {"name": name, "kind": "diffusion", "mask_token_id": MASK, "shifted_logits": False}
        settings = {"samples": SAMPLES, "steps": STEPS, "block_length": WRITTEN}
        self.lm: Any = language_model(
            about, self.model, tokenizer, diffusion=settings, batch_size=32, max_length=None
        )
        draw = np.random.default_rng(0)

        def some(low: int, high: int) -> list[int]:
            return draw.integers(10, vocabulary, draw.integers(low, high)).tolist()

        scored, pairs = [], []
        for question in range(QUESTIONS):
            context = some(100, 140)
            for option in range(4):
                scored.append(_instance("loglikelihood", ("?", "!"), question, option))
                pairs.append((context, some(3, 13)))
        asked = {"until": [], "max_gen_toks": WRITTEN}
        prompts = [_instance("generate_until", ("?", asked), number) for number in range(PROMPTS)]
        encoded = [(some(100, 140),) for _ in prompts]
        self.requests = {"loglikelihood": scored, "generate_until": prompts}
        self.encodings = {"loglikelihood": pairs, "generate_until": encoded}
        self.device = self.model.device

    def run(self, kind: str, *, level: float | None, ahead: int = 1, by_step: bool = True) -> float:
        """Seconds of all requests of a kind."""
        journalled.AHEAD = {self.device.type: ahead}
        given = {kind: self.requests[kind]}, lambda: {kind: self.encodings[kind]}
        work = self.lm.work(*given, greedy=())
        attached = (
            counted(self.model, self.parts)
            if level is None
            else sparsified(
                *(self.model, self.parts, "intermediate", TopP(), level), by_step=by_step
            )
        )
        with attached as counter, torch.no_grad():
            self.lm.start(Memory(), counter, work)
            self._wait()
            begun = time.perf_counter()
            getattr(self.lm, kind)(self.requests[kind])
            self._wait()
            return time.perf_counter() - begun

    def bare(self, kind: str) -> tuple[float, int, int]:
        """Seconds, passes and tokens of the passes that `run` makes, by themselves."""
        seen: list[Any] = []
        original = Passes.__call__

        def noted(passes: Passes, asked: Any) -> Any:
            seen.append(asked)
            return original(passes, asked)

        Passes.__call__ = noted  # type: ignore[method-assign]
        self.run(kind, level=None)
        Passes.__call__ = original  # type: ignore[method-assign]
        self._wait()
        begun = time.perf_counter()
        for asked in seen:
            for _ in self.lm.denoise(asked):
                pass
        self._wait()
        return time.perf_counter() - begun, len(seen), sum(asked.ids.numel() for asked in seen)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _instance(kind: str, arguments: tuple[Any, ...], document: int, number: int = 0) -> Instance:
    return Instance(kind, {}, arguments, number, ("bench", document, 1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="*", default=["1b"], choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(machine(arguments.device))
    for name in arguments.models:
        bench = Bench(name, arguments.device)
        for kind in bench.requests:
            variants: dict[str, dict[str, Any]] = {
                "dense": {"level": None},
                "dense, no batch ahead": {"level": None, "ahead": 0},
                "top-p 0.9": {"level": 0.9},
            }
            if kind == "generate_until":
                del variants["dense, no batch ahead"]
                variants["top-p 0.9, masks not followed"] = {"level": 0.9, "by_step": False}
            for variant in variants.values():
                bench.run(kind, **variant)  # compiles
            bench.bare(kind)
            found: dict[str, list[float]] = {variant: [] for variant in variants}
            bare, passes, tokens = [], 0, 0
            for _ in range(arguments.rounds):
                seconds, passes, tokens = bench.bare(kind)
                bare.append(seconds)
                for variant, options in variants.items():
                    found[variant].append(bench.run(kind, **options) / seconds)
            alone = statistics.median(bare)
            print(f"{name} {kind}: {passes} passes, {tokens:,} tokens, bare {alone:.3f} s")
            for variant, ratios in found.items():
                low, high = min(ratios), max(ratios)
                print(f"  {variant}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
