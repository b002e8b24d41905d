"""Generation with a recorded step, beside transformers' own loop and lm-eval's own model class.

    python benchmarks/generation.py
    python benchmarks/generation.py --device cpu --models tiny
    python benchmarks/generation.py --texts unequal --ways recorded

Llama 3.2 1B's layers and vocabulary, bfloat16 and random weights; prompts of 100 to 140 tokens, 64 at once.
`equal`: 64 texts of 256 tokens. `unequal`: 512 texts of 4 to 256 tokens, uniform in the logarithm: each of
the three is told where a text ends, after it has looked for stop strings as ever, since a random model ends
none. lm-eval's class counts nothing and drops nothing. Times include all that the host does; a first round,
which compiles and plans what is not there yet, stands by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface, utils_hf
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from llama import SHAPES, random_llama
from masked import Memory
from measure import machine
from sparsity_atlas.criteria.built_in.topp import TopP
from sparsity_atlas.lm import generation
from sparsity_atlas.lm import model as lm_model
from sparsity_atlas.lm.continuous.ends import Ends
from sparsity_atlas.lm.continuous.engine import Engine
from sparsity_atlas.lm.continuous.prompt_passes import PromptPasses
from sparsity_atlas.lm.continuous.recorded_step import Step
from sparsity_atlas.lm.generation import Text
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import counted, sparsified

Lengths = dict[tuple[int, ...], int]
EOS = 2
ROWS, WRITTEN = 64, 256
TEXTS = {"equal": 64, "unequal": 512}
LEVEL = 0.9
SHORTEST = 4
WAYS = ("own loop", "recorded")


class Bench:
    """A model, and its prompts.

    Args:
        name: of its shape.
        device: where it is.
        dtype: of its numbers.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.model = random_llama(
            *(name, device, dtype),
            **{"max_position_embeddings": 2048},
            **{"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0},
        )
        vocabulary = self.model.config.vocab_size
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
        self.lm = self.fresh()
        self.plain = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=ROWS)

    def fresh(self) -> AtlasLM:
        """Our class, which knows nothing yet: whether steps can be recorded is found out once."""
        return AtlasLM(self.model, self.tokenizer, batch_size=ROWS)

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

    def lengths(self) -> Lengths:
        """How many tokens the text of each prompt has, by the prompt's tokens."""
        draw = np.random.default_rng(1)
        count = TEXTS["unequal"]
        found = np.exp(draw.uniform(np.log(SHORTEST), np.log(WRITTEN), count)).astype(int)
        prompts = [self.tokenizer(text)["input_ids"] for text in self.prompts[:count]]
        return {tuple(one): int(length) for one, length in zip(prompts, found, strict=True)}

    def lm_eval(self, count: int) -> list[str]:
        """Texts of lm-eval's own class."""
        texts: list[str] = self.plain.generate_until(self.requests(count), disable_tqdm=True)
        return texts


class Told(StoppingCriteria):
    """Ends the rows of a batch where they are to end; looks like one of lm-eval's stop strings."""

    def __init__(self, lengths: Lengths, begin: int, rows: int) -> None:
        self.lengths, self.begin = lengths, begin
        self.done_tracker = [False] * rows
        self.wanted: list[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        if self.wanted is None:
            prompts = input_ids[:, : self.begin].tolist()
            self.wanted = [self.lengths[tuple(one for one in row if one)] for row in prompts]
        made = input_ids.shape[1] - self.begin
        self.done_tracker = [made >= wanted for wanted in self.wanted]
        return all(self.done_tracker)


@contextmanager
def told_where(lengths: Lengths) -> Iterator[None]:
    """Have all ways end texts where they are to end."""
    criteria, add = utils_hf.stop_sequences_criteria, Engine._add

    def stops(tokenizer: Any, stop: list[str], begin: int, rows: int) -> StoppingCriteriaList:
        return StoppingCriteriaList(
            [*criteria(tokenizer, stop, begin, rows), Told(lengths, begin, rows)]
        )

    def ended(engine: Engine, text: Text, token: int) -> Iterator[Text]:
        met = engine._ends.met
        wanted = lengths[tuple(text.prompt)]
        engine._ends.met = lambda tokens: met(tokens) or len(tokens) >= wanted
        try:
            yield from list(add(engine, text, token))
        finally:
            engine._ends.met = met

    huggingface.stop_sequences_criteria = generation.stop_sequences_criteria = stops
    Engine._add = ended
    try:
        yield
    finally:
        huggingface.stop_sequences_criteria = generation.stop_sequences_criteria = criteria
        Engine._add = add


def timed(call: Callable[[], Any], rounds: int) -> tuple[list[float], Any]:
    """Seconds of a first round, which makes what is made once, and of some more, and what came out."""
    found, seconds = None, []
    for _ in range(1 + rounds):
        begun = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - begun)
    return seconds, found


def said(seconds: list[float]) -> str:
    """Rounds in words."""
    first, *later = seconds
    return f"{statistics.median(later):.2f} s (spread {max(later) - min(later):.2f}; the first {first:.2f})"


def alike(some: list[str], others: list[str]) -> str:
    """The share of texts that are the same as far as both go."""
    pairs = zip(some, others, strict=True)
    return (
        f"{np.mean([one.startswith(other) or other.startswith(one) for one, other in pairs]):.3f}"
    )


class Parts:
    """What a recorded node was made of, in the last round: how often, and seconds of the host."""

    NAMED: ClassVar[dict[str, tuple[type, str]]] = {
        "recording": (Step, "record"),
        "steps": (Step, "run"),
        "passes over prompts": (PromptPasses, "begin"),
        "passes kept": (PromptPasses, "_keep"),
        "portions": (Step, "read"),
        "ends": (Ends, "met"),
        "telling": (AtlasLM, "told"),
    }

    def __init__(self) -> None:
        self.times: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for name, (owner, method) in self.NAMED.items():
            setattr(owner, method, self._watched(name, getattr(owner, method)))

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = method(*arguments, **options)
            self.times[name] = self.times.get(name, 0) + 1
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - begun
            # Of what a GPU has begun.
            return self._watched(f"waiting for {name}", found) if callable(found) else found

        return run

    def clear(self) -> None:
        """Begin a round."""
        self.times, self.seconds = {}, {}

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {count} ({self.seconds[name]:.2f} s)" for name, count in self.times.items()
        )


def measure(bench: Bench, count: int, rounds: int, ways: list[str], parts: Parts) -> None:
    """Print a row for each way and node.

    Args:
        bench: the model.
        count: of texts.
        rounds: of each, beside a first one.
        ways: some of `WAYS`.
        parts: of what is recorded.
    """
    found: dict[str, tuple[float, list[str]]] = {}

    def work(level: float | None) -> tuple[list[str], list[int]]:
        parts.clear()
        return bench.counted(count, level)

    for level in (None, LEVEL):
        for way in ways:
            lm_model.DEVICES = {bench.model.device.type} if way == "recorded" else set()
            bench.lm = bench.fresh()
            seconds, (texts, fed) = timed(partial(work, level), rounds)
            node = f"{'dense' if level is None else f'top-p {level}'}, {way}"
            found[node] = statistics.median(seconds[1:]), texts
            lengths = np.percentile(fed, [5, 50, 95]).astype(int).tolist()
            print(
                f"  {node}: {said(seconds)}; {sum(fed)} tokens fed back, 5, 50, 95 % of texts up to "
                f"{lengths}",
                flush=True,
            )
            if way == "recorded":
                print(f"    {parts}", flush=True)
        if len(ways) > 1:
            print(
                f"    texts alike in both ways: {alike(*(one[1] for one in [*found.values()][-2:]))}"
            )
    seconds, wanted = timed(partial(bench.lm_eval, count), rounds)
    print(f"  lm-eval's class: {said(seconds)}")
    plain = statistics.median(seconds[1:])
    for node, (took, texts) in found.items():
        print(f"  {plain / took:.2f} times {node}, texts alike: {alike(wanted, texts)}", flush=True)


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["1b"], choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of equal lengths; of unequal ones one"
    )
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    arguments = parser.parse_args()
    print(machine(arguments.device))
    parts = Parts()
    for name in arguments.models:
        bench = Bench(name, arguments.device, getattr(torch, arguments.dtype))
        for kind in arguments.texts:
            print(f"{name}, {kind}", flush=True)
            equal = kind == "equal"
            with nullcontext() if equal else told_where(bench.lengths()):
                measure(bench, TEXTS[kind], arguments.rounds if equal else 1, arguments.ways, parts)


if __name__ == "__main__":
    main()
