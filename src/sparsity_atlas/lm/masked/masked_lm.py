"""A masked-diffusion model as lm-eval's: bounds of likelihoods, and text by filling masks in."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import postprocess_generated_text

from sparsity_atlas.config.model_entry import DiffusionSettings
from sparsity_atlas.diffusion.denoise import Denoise, denoiser
from sparsity_atlas.diffusion.likelihood import row_scores
from sparsity_atlas.diffusion.unmask import Schedule, unmask
from sparsity_atlas.files.whole import digest
from sparsity_atlas.lm.journalled import JournalledLM
from sparsity_atlas.lm.masked.denoising_options import options_of
from sparsity_atlas.lm.masked.masked_usage import MaskedUsage
from sparsity_atlas.lm.masked.masked_work import MaskedWork, RowBatch, arrange_rows
from sparsity_atlas.lm.masked.passes import Passes
from sparsity_atlas.sparsify.step_counts import mask_bytes
from sparsity_atlas.terms import DENOISING, SCORING

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.lm.journalled import Records
    from sparsity_atlas.lm.kept.kept_work import Keep
    from sparsity_atlas.lm.work import Arranged, Encoding
    from sparsity_atlas.models.memory import Largest
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.terms import Phase


class MaskedLM(JournalledLM):
    """A loaded model in which each token sees all others, asked with masks.

    A likelihood is a bound (`diffusion.mask_sets`), exact where all sets of masked tokens are no more than
    the samples, else an unbiased estimate. Its masks follow from the request alone: they are the same for
    each level, for the dense model and in any batch.
    """

    denoises = True
    usage: MaskedUsage

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_token: int,
        shifted: bool,
        diffusion: DiffusionSettings | None = None,
        **options: Any,
    ) -> None:
        """Take a loaded model.

        Args:
            model: see `PromptLM`.
            tokenizer: likewise.
            mask_token: id of the mask.
            shifted: see `denoiser`.
            diffusion: how it is asked; None: by default.
            options: see `PromptLM`.
        """
        super().__init__(model, tokenizer, **options)
        self.mask_token = mask_token
        self.diffusion = diffusion or DiffusionSettings()
        self._shifted = shifted

    def identity(self) -> dict[str, Any]:
        """See `PromptLM`; what likelihoods and texts depend on besides."""
        return {**super().identity(), "diffusion": self.diffusion.model_dump()}

    @cached_property
    def denoise(self) -> Denoise:
        """The model; made before anything is attached to it."""
        return denoiser(self.model, shifted=self._shifted)

    def work(
        self,
        requests: dict[str, list[Instance]],
        encodings: Callable[[], dict[str, list[Encoding]]],
        *,
        share: bool = True,
        greedy: Container[str] | None = None,
        keep: Keep | None = None,
    ) -> MaskedWork:
        """Arrange a task's requests in batches; see `arrange_rows`."""
        assert callable(self.denoise)
        for request in requests.get("generate_until", ()):
            self._options(request)
        samples = self.diffusion.samples
        return arrange_rows(
            *(requests, encodings(), self.limits),
            samples=samples,
            mask_token=self.mask_token,
            greedy=greedy,
        )

    def start(self, journal: Records, counter: Counter, work: Arranged) -> None:
        """Begin a task; see `JournalledLM.start`."""
        assert isinstance(work, MaskedWork)
        super().start(journal, counter, work)
        self._work = work
        self.usage = MaskedUsage(work, counter)

    def _beside(self, work: Arranged, counter: Counter, batch: Largest) -> int:
        """See `JournalledLM._beside`: masks of two steps."""
        if DENOISING not in work.phases:
            return 0
        rows = -(-batch.tokens // max(batch.longest, 1))
        # No more steps than tokens.
        return mask_bytes(counter.by_step.slots, rows, batch.longest, batch.longest)

    def _passes(self, phase: Phase, sequences: int) -> Passes:
        return Passes(self.denoise, self._counter, phase, sequences, self.mask_token)

    @property
    def _asking(self) -> dict[str, Any]:
        guidance = self.diffusion.guidance
        return {"mask_token": self.mask_token, "guidance": guidance, "device": self.device}

    # Log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The bound of each answer, and whether the model would say it, a token a step.

        The latter is looked at only for tasks that ask for it; see `work`.
        """
        bounds, hits = self._bounds("loglikelihood")
        for number, hit in self._greedy().items():
            hits[number] = hit
        return list(zip(bounds, hits, strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The bound of each whole document: that of its disjoint windows, one after the other."""
        parts: list[list[float]] = [[] for _ in requests]
        bounds, _ = self._bounds("loglikelihood_rolling")
        for request, bound in zip(self._work.windows, bounds, strict=True):
            parts[request].append(bound)
        return [math.fsum(own) for own in parts]

    def _bounds(self, kind: str) -> tuple[list[float], list[bool]]:
        """Of each request the bound, and of answers of one token whether it is the likeliest."""
        scored, batches = self._work.scored[kind], self._work.batches[kind]
        parts: list[list[float]] = [[] for _ in scored]
        likeliest = [False] * len(scored)
        records = self._in_flight(partial(self._score, kind, one) for one in batches)
        for batch, record in zip(batches, records, strict=True):
            self.usage.add_rows(batch.owners, record)
            found = zip(batch.number.tolist(), record["parts"], record["likeliest"], strict=True)
            for number, part, hit in found:
                parts[number].append(part)
                likeliest[number] = hit and len(scored[number].answer) == 1
        # Added up in an order of its own: that of the batches follows from their size.
        bounds = [math.fsum(own) for own in parts]
        owners = self._work.owners[kind]
        if kind == "loglikelihood_rolling":
            owners = [owners[request] for request in self._work.windows]
        self.usage.add_bounds(owners, scored, bounds)
        return bounds, likeliest

    def _score(self, kind: str, batch: RowBatch) -> Callable[[], dict[str, Any]]:
        """Begin one batch.

        Returns:
            What waits for it, and gives the part of the bound of each reading; see `Passes.record`.
        """
        rows = self._work.rows(kind, batch, self.padding_id)
        passes = self._passes(SCORING, len(batch.owners))
        scores = row_scores(passes, rows, **self._asking)
        record = passes.record()

        def read() -> dict[str, Any]:
            counted, found = record(), scores()
            return {
                "parts": [
                    w * score for w, (score, _) in zip(rows.weights.tolist(), found, strict=True)
                ],
                "likeliest": [hit for _, hit in found],
                **counted,
            }

        return read

    def _greedy(self) -> dict[int, bool]:
        """Whether answers of several tokens are what the model would say, of requests by number."""
        found: dict[int, bool] = {}
        owners = self._work.owners["loglikelihood"]
        for numbers in self._work.greedy:
            record = self._batch(partial(self._said, numbers))
            self.usage.add_denoised([owners[one] for one in numbers], record)
            found.update(zip(numbers, record["said"], strict=True))
        return found

    def _said(self, numbers: list[int]) -> dict[str, Any]:
        """Whether equally long answers are said, the surest token first; see `Passes.record`."""
        own = [self._work.scored["loglikelihood"][one] for one in numbers]
        length = len(own[0].answer)
        passes = self._passes(DENOISING, len(own))
        schedule = Schedule(length, length, length)
        prompts = [one.prompt for one in own]
        texts = unmask(passes, prompts, schedule, padding=self.padding_id, **self._asking)
        said = [text == list(one.answer) for text, one in zip(texts, own, strict=True)]
        return {"said": said, **passes.record()()}

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Fill in as many masks as there are tokens to generate; a stop string ends the text."""
        answers = [""] * len(requests)
        owners = self._work.owners["generate_until"]
        for numbers in self._work.prompts:
            record = self._batch(partial(self._generate, requests[numbers[0]], numbers))
            own = [owners[one] for one in numbers]
            self.usage.add_denoised(own, record)
            self.usage.add_ends(own, record["cut"], record["unfinished"])
            for number, text in zip(numbers, record["texts"], strict=True):
                answers[number] = text
        return answers

    def _generate(self, request: Instance, numbers: list[int]) -> dict[str, Any]:
        """Texts of one batch of prompts, and what both lost; see `Passes.record`.

        Args:
            request: one of them; all have the same options.
            numbers: of the requests.
        """
        options = self._options(request)
        asked = [self._work.asked[one] for one in numbers]
        prompts = [tokens[options.schedule.length - self.max_length :] for tokens in asked]
        passes = self._passes(DENOISING, len(prompts))

        def finished(row: int, tokens: list[int]) -> bool:
            if not self._ends.isdisjoint(tokens):
                return True
            text = self.tok_decode(tokens) or ""
            return any(stop in text for stop in options.stops if stop)

        found = unmask(
            passes,
            *(prompts, options.schedule),
            padding=self.padding_id,
            remasking=options.remasking,
            seeds=[digest(prompt) for prompt in prompts],
            finished=finished,
            **self._asking,
        )
        return {
            "texts": [self._text(tokens, options.stops) for tokens in found],
            "cut": [len(a) - len(p) for a, p in zip(asked, prompts, strict=True)],
            "unfinished": [not finished(row, tokens) for row, tokens in enumerate(found)],
            **passes.record()(),
        }

    def _options(self, request: Instance) -> Any:
        return options_of(request, self.diffusion, self.max_length, self.max_gen_toks)

    @cached_property
    def _ends(self) -> set[int]:
        """Tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        found = set(ends) if isinstance(ends, list) else {ends}
        return {one for one in (*found, self.eot_token_id) if one is not None}

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """What is said by some tokens: without a chain of thought, up to an end."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        tokens, thought = tokens[:end], self.think_end_token
        if isinstance(thought, int) and thought in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(thought) :]
        text = (self.tok_decode(tokens) or "") if tokens else ""
        text = text.lstrip() if isinstance(thought, int) else text
        said: str = postprocess_generated_text(
            text, stops, thought if isinstance(thought, str) else None
        )
        return said
