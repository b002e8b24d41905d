"""Generation with a recorded step, beside transformers' own loop and lm-eval's own model class.

    python benchmarks/generation.py
    python benchmarks/generation.py --device cpu --models tiny

Llama 3.2 1B's layers and vocabulary, bfloat16 and random weights; prompts of 100 to 140 tokens, 64 at once.
`equal`: 64 texts of 256 tokens. `unequal`: 512 texts that end at some of a few hundred end tokens, which
are chosen so that most texts are short and some run to their budget. Each of the three generates the same
prompts; lm-eval's class counts nothing and drops nothing. Times include all that the host does.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from masked import SHAPES, Memory
from measure import machine
from sparsity_atlas.criteria.built_in.topp import TopP
from sparsity_atlas.lm import model as lm_model
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import counted, sparsified

EOS = 2
ROWS, WRITTEN = 64, 256
TEXTS = {"equal": 64, "unequal": 512}
LEVEL = 0.9
# Of texts whose lengths are chosen: the shortest, and how many of them choose.
SHORTEST, CHOOSING = 4, 256


class Bench:
    """A model, and its prompts.

    Args:
        name: of its shape.
        device: where it is.
        dtype: of its numbers.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        layers, hidden, width, heads, groups, vocabulary = SHAPES[name]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        self.parts = find_parts(self.model)
        # So that the end token's text is no part of another's.
        words = {f"w{number};": number for number in range(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3;"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{"pad_token": "w0;", "bos_token": "w1;", "eos_token": "w2;", "unk_token": "w3;"},
        )
        draw = np.random.default_rng(0)
        self.prompts = [
            " ".join(
                f"w{token}" for token in draw.integers(10, vocabulary, draw.integers(100, 140))
            )
            for _ in range(max(TEXTS.values()))
        ]
        self.lm = AtlasLM(self.model, self.tokenizer, batch_size=ROWS)
        self.plain = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=ROWS)

    def requests(self, count: int) -> list[Instance]:
        asked = {"until": [], "max_gen_toks": WRITTEN}
        return [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(prompt, asked),
                idx=0,
                metadata=("texts", number, 1),
            )
            for number, prompt in enumerate(self.prompts[:count])
        ]

    def counted(self, count: int, level: float | None) -> tuple[list[str], list[int]]:
        """Texts of the first prompts, and the tokens of each that were fed back."""
        requests = {"generate_until": self.requests(count)}
        encoded = {"generate_until": self.lm.encode("generate_until", requests["generate_until"])}
        work = self.lm.work(requests, lambda: encoded)
        attached = (
            counted(self.model, self.parts)
            if level is None
            else sparsified(self.model, self.parts, "intermediate", TopP(), level)
        )
        with attached as counter:
            self.lm.start(Memory(), counter, work)
            texts = self.lm.generate_until(requests["generate_until"])
        return texts, self.lm.usage.tokens["generation"].tolist()

    def lm_eval(self, count: int) -> list[str]:
        """Texts of lm-eval's own class."""
        texts: list[str] = self.plain.generate_until(self.requests(count), disable_tqdm=True)
        return texts

    def end_somewhere(self) -> None:
        """Choose end tokens among what is generated, so that texts differ in length."""
        texts, _ = self.counted(CHOOSING, None)
        tokens = [[int(one) for one in re.findall(r"w(\d+);", text)] for text in texts]
        early = {token for own in tokens for token in own[:SHORTEST]}
        draw = np.random.default_rng(1)
        lengths = np.exp(draw.uniform(np.log(SHORTEST), np.log(WRITTEN), len(texts))).astype(int)
        ends = {EOS}
        for own, length in zip(tokens, lengths, strict=True):
            ends.update([token for token in own[length:] if token not in early][:1])
        self.model.generation_config.eos_token_id = sorted(ends)


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, float, Any]:
    """Median seconds of some rounds after one that is not counted, their spread, and what came out."""
    found = call()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), max(seconds) - min(seconds), found


def alike(one: list[str], other: list[str]) -> str:
    """The share of texts that are the same."""
    return f"{np.mean([a == b for a, b in zip(one, other, strict=True)]):.3f}"


def measure(bench: Bench, count: int, rounds: int) -> None:
    """Print a row for each way and node.

    Args:
        bench: the model.
        count: of texts.
        rounds: of each.
    """
    plain, spread, wanted = timed(partial(bench.lm_eval, count), rounds)
    print(f"  lm-eval's class: {plain:.2f} s (spread {spread:.2f})", flush=True)
    for level in (None, LEVEL):
        found = {}
        for way, devices in (("own loop", set()), ("recorded", {bench.model.device.type})):
            lm_model.DEVICES = devices
            took, spread, (texts, fed) = timed(partial(bench.counted, count, level), rounds)
            found[way] = texts
            node = "dense" if level is None else f"top-p {level}"
            lengths = np.percentile(fed, [5, 50, 95]).astype(int).tolist()
            print(
                f"  {node}, {way}: {took:.2f} s (spread {spread:.2f}), lm-eval's class {plain / took:.2f} "
                f"times that; {sum(fed)} tokens fed back, 5, 50, 95 % of texts up to {lengths}",
                flush=True,
            )
        print(f"    texts alike in both ways: {alike(*found.values())}")
        if level is None:
            print(f"    and with lm-eval's class: {alike(wanted, found['recorded'])}", flush=True)


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["1b"], choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(machine(arguments.device))
    for name in arguments.models:
        bench = Bench(name, arguments.device, getattr(torch, arguments.dtype))
        print(f"{name}, equal")
        measure(bench, TEXTS["equal"], arguments.rounds)
        bench.end_somewhere()
        print(f"{name}, unequal")
        measure(bench, TEXTS["unequal"], 1)


if __name__ == "__main__":
    main()
