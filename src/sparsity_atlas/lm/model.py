"""lm-eval's Hugging Face model with fixed batches, a journal, and counts that know the padding."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.utils import normalize_gen_kwargs

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.lm import forest, forward
from sparsity_atlas.lm.answers import Answers
from sparsity_atlas.lm.continuous.able import DEVICES
from sparsity_atlas.lm.continuous.generator import Generator
from sparsity_atlas.lm.continuous.ring_proof import proved
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.lm.generation import GeneratingLM
from sparsity_atlas.lm.journalled import Early
from sparsity_atlas.lm.kept.kept_work import arrange_once
from sparsity_atlas.lm.longest import Lengths
from sparsity_atlas.lm.sharing import abilities
from sparsity_atlas.lm.usage import expert_record, packed
from sparsity_atlas.lm.work import Work, arrange
from sparsity_atlas.models.logits import head
from sparsity_atlas.sites.find import random_ids
from sparsity_atlas.sparsify.transfer import fetched, sent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.lm.answers import Proof
    from sparsity_atlas.lm.journalled import Records
    from sparsity_atlas.lm.kept.kept_work import Keep
    from sparsity_atlas.lm.longest import Memory
    from sparsity_atlas.lm.work import Arranged, Encoding
    from sparsity_atlas.sparsify.attach import Counter

# Tokens that a ring is tried with, again and again.
SAMPLED = 64
# What is said, once, of a model that cannot do something.
SLOWER = {
    "branches": "each answer option reads its whole context, since they cannot share it here",
    "selects": "logits of whole batches are computed at once, since the head cannot be shown a few tokens",
    "follows": "batches are lm-eval's own, since the model's numbers follow the longest sequence",
    "steps": "transformers' own loop generates, since a step cannot be recorded here",
}

# What nearly every model does right, for those whose weights are not there to be tried.
LIKELY = Abilities(branches=True, selects=True)


class AtlasLM(GeneratingLM):
    """HFLM over a loaded causal model, whose batches are journalled and counted.

    Requests are answered as HFLM answers them, but what they have in common is run once.
    """

    _work: Work

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        """See `PromptLM`."""
        super().__init__(model, tokenizer, **options)
        self._told: set[str] = set()
        self._lengths = Lengths(model, self.max_length)
        self._known = Answers()
        self._ring: Proof | None = None

    def work(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        *,
        share: bool = True,
        greedy: Container[str] | None = None,
        keep: Keep | None = None,
    ) -> Work:
        """Arrange a task's requests in batches; see `work.arrange`."""
        encodings = functools.cache(encodings)
        generated = requests.get("generate_until", [])
        work = self._arranged(requests, encodings, generated, share=share, keep=keep)
        if generated:
            self._try_generation(work, generated)
        return work

    def _arranged(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        generated: list[Instance],
        *,
        share: bool,
        keep: Keep | None,
    ) -> Work:
        def found(some: list[forest.Request], branching: bool) -> Abilities:
            follows = self._lengths.watched and self._follows(
                some, list(zip(generated, encodings().get("generate_until", []), strict=True))
            )
            able = self._abilities(some, branching and not follows) if some else Abilities()
            return replace(able, follows=follows)

        # Whether its numbers follow the longest sequence is found out with all of them.
        if keep is None or self._lengths.watched:
            return arrange(requests, encodings(), self.limits, found, share=share)
        return arrange_once(requests, encodings, self.limits, found, share=share, keep=keep)

    def arrange_ahead(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        keep: Keep,
    ) -> None:
        """See `JournalledLM`."""
        if not self._lengths.watched:
            arrange_once(requests, encodings, self.limits, lambda *_: LIKELY, share=True, keep=keep)

    def remember(self, digest: str) -> None:
        """Keep what the model is seen to do right in the user's cache, for other processes.

        Args:
            digest: of the model's files.
        """
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._known = Answers(
            {
                "model": digest,
                "dtype": str(self.model.dtype),
                "attention": self.model.config._attn_implementation,
                "device": name,
                "code": code_version("lm.continuous.ring_proof"),
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            }
        )

    def _follows(
        self, requests: list[forest.Request], prompts: list[tuple[Instance, Encoding]]
    ) -> bool:
        """Whether the model's numbers of these follow the longest of them."""
        sequences = [request.run for request in requests]
        reach = max(map(len, sequences), default=0)
        for request, (tokens,) in prompts:
            room = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            reach = max(reach, min(len(tokens) + room, self.max_length))
            sequences.append(tokens)
        follows = self._lengths.followed(max(sequences, key=len), reach)
        if follows:
            self._tell("follows", f"{reach} tokens")
        return follows

    def _abilities(self, requests: list[forest.Request], branching: bool) -> Abilities:
        longest = max(len(request.tokens) for request in requests) - 1
        found, faults = abilities(
            self.model,
            requests,
            branching=branching,
            # Not beyond a length that may change the model's numbers.
            most=min([n for n in self._lengths.declared if n >= longest], default=self.max_length),
            answers=self._known,
            tries=self.tries,
        )
        for name, fault in faults.items():
            self._tell(name, fault)
        return found

    def _try_generation(self, work: Work, generated: list[Instance]) -> None:
        """See, before anything is attached, if the head can be shown a few tokens and rows begin apart."""
        head.able(self.model)
        if self.device.type not in DEVICES:
            return
        ends = (
            tokens + self.limits.room(request)
            for request, tokens in zip(generated, work.lengths, strict=True)
        )
        longest = min(max(ends), self.max_length)
        if self._known.about_rings(longest) is None:
            tokens = random_ids(self.model, (1, SAMPLED))[0].tolist()
            self._known.add_ring(proved(self.model, tokens, longest))
        self._ring = self._known.about_rings(longest)

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told:
            cli.logger.info("%s: %s", SLOWER[name], why)
            self._told.add(name)

    def start(self, journal: Records, counter: Counter, work: Arranged) -> None:
        """Begin a task; see `JournalledLM.start`."""
        assert isinstance(work, Work)
        super().start(journal, counter, work)
        self._work = work
        self._state: Memory = {}
        self._lengths.restore(self._state)

    def _batch(self, compute: Callable[[], Any]) -> Any:
        """See `JournalledLM`; what the model remembers is kept with what it said."""
        follows = self._work.abilities.follows

        def computed() -> Any:
            if follows:
                self._lengths.restore(self._state)
            record = compute()
            if follows and (state := self._lengths.state()) != self._state:
                record["state"] = state
            return record

        record = super()._batch(computed)
        self._state = record.get("state", self._state)
        return record

    # Log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score each request's continuation; see `HFLM.loglikelihood`."""
        return self._answers("loglikelihood", len(requests))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents in disjoint windows; see `HFLM.loglikelihood_rolling`."""
        totals = [0.0] * len(requests)
        windows = self._work.windows
        scores = self._answers("loglikelihood_rolling", len(windows))
        for request, (score, _) in zip(windows, scores, strict=True):
            totals[request] += score
        return totals

    def _answers(self, kind: str, count: int) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * count
        batches = self._work.batches[kind]
        # A model that remembers earlier batches is seen after each of them.
        records = self._in_flight(
            (partial(self._begun, self._score, one) for one in batches),
            ahead=not self._work.abilities.follows,
        )
        for batch, record in zip(batches, records, strict=True):
            self.usage.add_scored(batch, record)
            found = zip(record["scores"], record["greedy"], strict=True)
            for number, answer in zip(batch.requests, found, strict=True):
                answers[number] = answer
        return answers

    def _begin_following(self) -> Early | None:
        work = None if self._lengths.watched else self.following()
        if not isinstance(work, Work) or (first := work.first) is None:
            return None
        try:
            self._check_room([work], self._counter)
        except AtlasError:
            return None  # which is said when its turn comes
        own, self._work = self._work, work
        early = Early(work, first, self._score(first))
        self._work = own
        return early

    def _score(self, batch: forest.Batch) -> Callable[[], dict[str, Any]]:
        """Begin one batch.

        Returns:
            What waits for it, and gives zeros of its documents [documents, slots] (`packed`) and the scores
            of its requests.
        """
        valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        counter = self._counter
        by_expert = counter.by_expert
        times = sent(forest.times(batch), self.device) if by_expert.slots else None
        counter.expect(sent(valid, self.device), times=times)
        found = forward.logits(
            self.model,
            self._model_call,
            batch,
            select=self._work.abilities.selects,
            masks=self._work.abilities.masks,
        )
        zeros, _, finite = counter.take_unseen()
        seen = fetched([finite, *by_expert.take()])
        counts = forward.zeros_by_document(zeros, batch)
        scores = forward.scores(found, batch)

        def read() -> dict[str, Any]:
            whole, *experts = seen()
            counter.check(whole.tolist())
            every, once = counts()
            sums, greedy = scores()
            return {
                **{"zeros": packed(every), "unique": packed(once)},
                **{"scores": sums, "greedy": greedy},
                **expert_record(experts),
            }

        return read

    def _model_call(self, inps: Tensor, *_: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(inps, **options).logits
        return logits

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate until a stop sequence; see `HFLM.generate_until`."""
        answers = [""] * len(requests)
        owners = self._work.owners["generate_until"]
        last = self._work.last_prompts()
        batches = [[requests[index] for index in prompts] for prompts in self._work.prompts]
        generator = self._generator(batches)
        for number, (prompts, batch) in enumerate(zip(self._work.prompts, batches, strict=True)):
            # Sampling must not depend on where an earlier run was cut.
            seed = self._replayed
            once = [index in last for index in prompts]
            record = self._batch(partial(self._texts_of, generator, number, batch, seed, once))
            lengths = [self._work.lengths[index] for index in prompts]
            self.usage.add_generated([owners[index] for index in prompts], lengths, record)
            for index, text in zip(prompts, record["texts"], strict=True):
                answers[index] = text
        return answers

    def _generator(self, batches: list[list[Instance]]) -> Generator | None:
        """What generates with a recorded step, where that was proved to be right."""
        if self._ring is None or self._work.abilities.follows:
            return None
        if self._ring.masks is None:
            self._tell("steps", self._ring.fault)
            return None
        return Generator(
            self, self._counter, self._ring.masks, batches, partial(self._tell, "steps")
        )

    def _texts_of(
        self,
        generator: Generator | None,
        number: int,
        batch: list[Instance],
        seed: int,
        once: list[bool],
    ) -> dict[str, Any]:
        texts = generator.texts(number) if generator else None
        return self.generate(batch, seed, once) if texts is None else self.told(batch, texts)
