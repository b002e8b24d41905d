"""Generation as HFLM does it, noting what each row of a batch fed to the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sparsity_atlas.errors import TaskFailure, UnknownTokens
from sparsity_atlas.lm.generation_options import CacheWatch, check_options
from sparsity_atlas.lm.journalled import JournalledLM
from sparsity_atlas.lm.usage import expert_record
from sparsity_atlas.models.logits import head
from sparsity_atlas.sparsify.attach import NumericalFailure
from sparsity_atlas.sparsify.transfer import sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance
    from torch import Tensor


@dataclass(eq=False)
class Text:
    """What became of a prompt.

    Attributes:
        number: of the prompt.
        prompt: its tokens.
        tokens: that were generated.
        ended: whether it came to an end of its own, before its budget.
        prompt_zeros: of the prompt's tokens, int64 [slots].
        zeros: of the tokens that were generated and fed back, int64 [slots].
    """

    number: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    prompt_zeros: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    zeros: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    given: int = 0  # steps that were begun for it
    done: bool = False


class GeneratingLM(JournalledLM):
    """HFLM whose generation is counted."""

    _texts: list[Text] | None = None  # of the batch in hand, where they are there already

    def told(self, batch: list[Instance], texts: list[Text]) -> dict[str, Any]:
        """What `generate` returns, of texts that were generated otherwise.

        Args:
            batch: the requests, longest first.
            texts: of these.
        """
        self._texts = texts
        try:
            # HFLM reads each prompt once to sort them; a GPU may wait meanwhile.
            with self._tokenised([one.args[0] for one in batch]):
                answers = HFLM.generate_until(self, batch, disable_tqdm=True)
        finally:
            self._texts = None
        return {
            "texts": answers,
            "unfinished": [not text.ended for text in texts],
            "prompt_tokens": [len(text.prompt) for text in texts],
            "prompt_zeros": [text.prompt_zeros.tolist() for text in texts],
            "generation_tokens": [len(text.tokens) - 1 for text in texts],
            "generation_zeros": [text.zeros.tolist() for text in texts],
        }

    def generate(self, batch: list[Instance], seed: int, once: list[bool]) -> dict[str, Any]:
        """Generate for one batch of requests with the same options.

        Args:
            batch: the requests, longest first.
            seed: for options that sample.
            once: of each request, whether its prompt counts where each token of a document does once.

        Returns:
            Of each row its text, whether it came to the end of its budget of tokens before its own, tokens
            run and zeros [row][slots] of the prompt and of what was generated and fed back; sums by expert,
            as `expert_record` puts them.

        Raises:
            TaskFailure: options, or a model, that cannot be counted.
            NumericalFailure: NaN or an infinity came up.
        """
        options = self.options_of(batch[0])
        if options.get("do_sample"):
            torch.manual_seed(seed)
        self._logits = _LogitsWatch()
        self._once = once
        cache = CacheWatch(batch[0].task_name)
        watching = self.model.register_forward_pre_hook(cache, with_kwargs=True)
        try:
            texts = HFLM.generate_until(self, batch, disable_tqdm=True)
        except UnknownTokens as error:
            # What is scored by this model may be counted all the same.
            raise TaskFailure(f"'{batch[0].task_name}': it generates, and {error}") from None
        except RuntimeError:
            # Nothing can be drawn from NaN; what follows says where it came from.
            if not self._logits.broken:
                raise
        finally:
            watching.remove()
        prompt, steps = (zeros.cpu().numpy() for zeros in self._counter.take())
        experts = [sums.cpu().numpy() for sums in self._counter.by_expert.take()]
        if self._logits.broken:
            raise NumericalFailure("NaN or infinity in the logits")
        # Step s feeds a row's generated token s, which a row that finished before does not have.
        fed = np.minimum(np.maximum(self._finished_at - 1, 0), len(steps))
        counts = np.arange(1, len(steps) + 1)[:, None] <= fed  # [steps, batch]
        return {
            "texts": texts,
            "unfinished": self._unfinished,
            "prompt_tokens": self._prompt_tokens,
            "prompt_zeros": prompt.sum(2).T.tolist(),
            "generation_tokens": fed.tolist(),
            "generation_zeros": (steps * counts[:, None]).sum(0).T.tolist(),
            **expert_record(experts),
        }

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """As `HFLM._model_generate`, noting which tokens are padding and when each row finished."""
        if self._texts is not None:
            return self._behind(context, self._texts)
        mask = generation_kwargs["attention_mask"].bool()
        self._prompt_tokens = mask.sum(1).tolist()
        generation_kwargs["temperature"] = generation_kwargs.get("temperature", 0.0)
        cold = generation_kwargs["temperature"] == 0.0
        if cold and generation_kwargs.setdefault("do_sample", False) is False:
            # Greedy decoding; transformers warns of a temperature beside it.
            del generation_kwargs["temperature"]
        # Beside the tokens there would be what nobody reads; a model's own configuration may ask for it.
        generation_kwargs["return_dict_in_generate"] = False
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        watch = _FinishWatch(stops, self.end_tokens(), context.shape, self._feed)
        once = torch.tensor(self._once, device=mask.device)[:, None]
        self._counter.expect(mask, "prompt", torch.stack([mask, mask & once]).long())
        with torch.no_grad(), head.shown_the_last(self.model):
            output: Tensor = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([*stops, watch]),
                logits_processor=LogitsProcessorList([self._logits]),
                pad_token_id=self.padding_id,
                use_cache=True,
                **head.of_the_last(self.model),
                **generation_kwargs,
            )
        generated = output.shape[1] - context.shape[1]
        self._unfinished = (watch.finished_at == 0).tolist()
        self._finished_at = np.where(watch.finished_at > 0, watch.finished_at, generated)
        return output

    def options_of(self, request: Instance) -> dict[str, Any]:
        """A request's options of generation, as lm-eval reads them.

        Raises:
            TaskFailure: some that cannot be counted.
        """
        options: dict[str, Any] = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
        check_options(request, options, self.model.generation_config, self.max_length)
        return options

    def _behind(self, context: Tensor, texts: list[Text]) -> Tensor:
        """Prompts [batch, longest] with what was generated behind them, as `generate` would give it."""
        longest = max(len(text.tokens) for text in texts)
        output = context.new_full((len(texts), context.shape[1] + longest), self.padding_id)
        output[:, : context.shape[1]] = context
        for row, text in zip(output, texts, strict=True):
            end = context.shape[1] + len(text.tokens)
            row[context.shape[1] : end] = torch.tensor(text.tokens)
        return output

    def _feed(self, going: np.ndarray) -> None:
        """Announce a pass over what was generated last: tokens of rows that had finished do not count."""
        if self._counter.by_expert.slots:
            self._counter.feed(sent(going.astype(np.int64), self.device))

    def end_tokens(self) -> set[int]:
        """Tokens that end a text, whatever the stop strings."""
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


class _FinishWatch(StoppingCriteria):
    """Notes at which generated token each row met a stop string or the end token; stops nothing.

    Tells after each token which rows go on, bool [batch].
    """

    def __init__(
        self,
        stops: StoppingCriteriaList,
        ends: set[int],
        shape: torch.Size,
        tell: Callable[[np.ndarray], None],
    ) -> None:
        self.tell = tell
        self.stops = stops
        self.ends = ends
        self.prompt = shape[1]
        self.finished_at = np.zeros(shape[0], dtype=np.int64)  # 0: not yet

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, last in enumerate(input_ids[:, -1].tolist()):
            stopped = last in self.ends or any(stop.done_tracker[row] for stop in self.stops)
            if stopped and self.finished_at[row] == 0:
                self.finished_at[row] = input_ids.shape[1] - self.prompt
        self.tell(self.finished_at == 0)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _LogitsWatch(LogitsProcessor):
    """Notes whether NaN or infinity came up in the logits; changes nothing."""

    def __init__(self) -> None:
        self.broken: bool | Tensor = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity is how transformers forbids a token.
        self.broken = self.broken | ~(scores < torch.inf).all()
        return scores
