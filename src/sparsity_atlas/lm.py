"""lm-eval's Hugging Face model with fixed batches, a journal, and counts that know the padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sparsify import NumericalFailure

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.journal import Journal
    from sparsity_atlas.sparsify import Counter


@dataclass
class Usage:
    """What one request cost: tokens that were run, zeros in each slot, nats over predicted tokens."""

    prefill_tokens: int
    prefill_zeros: np.ndarray  # int64 [slots]
    generation_tokens: int
    generation_zeros: np.ndarray  # int64 [slots]
    nats: float = 0.0
    predicted: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_zeros + other.prefill_zeros,
            self.generation_tokens + other.generation_tokens,
            self.generation_zeros + other.generation_zeros,
            self.nats + other.nats,
            self.predicted + other.predicted,
        )


class AtlasLM(HFLM):
    """HFLM over a loaded model, whose batches are journalled and counted.

    Requests are answered as HFLM answers them. The order of batches depends on the requests and the
    batch size alone, so a journal of an earlier run continues at a batch boundary.

    Attributes:
        usage: for each (task, document) the sum of its requests' usage, since `start`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )

    def start(self, journal: Journal, counter: Counter) -> None:
        """Begin a task: answer from `journal` what it holds, compute and record the rest."""
        self._journal = journal
        self._counter = counter
        self._replayed = 0
        self.usage: dict[tuple[str, int], Usage] = {}

    def _batch(self, compute: Callable[[], Any]) -> Any:
        """The next batch's record: from the journal if an earlier run got so far."""
        if self._replayed == len(self._journal.records):
            self._journal.append(compute())
        record = self._journal.records[self._replayed]
        self._replayed += 1
        return record

    def _credit(self, request: Instance, usage: Usage) -> None:
        key = (request.task_name, request.doc_id)
        self.usage[key] = self.usage[key] + usage if key in self.usage else usage

    # Log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score each request's continuation; see `HFLM.loglikelihood`."""
        self._owners = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents in disjoint windows; see `HFLM.loglikelihood_rolling`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        self._owners = []
        for request in requests:
            (string,) = request.args
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                self._owners.append(request)
            # An empty document has no window, and costs nothing.
            nothing = np.zeros(len(self._counter.slots), dtype=np.int64)
            self._credit(request, Usage(0, nothing, 0, nothing))
        scores = self._loglikelihood_tokens(windows)
        totals = {id(request): 0.0 for request in requests}
        for owner, (score, _) in zip(self._owners, scores, strict=True):
            totals[id(owner)] += score
        return [totals[id(request)] for request in requests]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score tokenised requests.

        Requests with the same input share a row of the batch, as in HFLM; each is credited with it.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise AtlasError(
                    f"tasks: '{self._owners[index].task_name}', document "
                    f"{self._owners[index].doc_id}: max_length: {len(continuation)} tokens to "
                    f"score, at most {self.max_length} and at least 1 can be"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            rows.setdefault(tuple(tokens), []).append(index)
        # Longest first, as HFLM does: running out of memory shows at once.
        order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            targets = [[requests[index][2] for index in rows[tokens]] for tokens in batch]
            record = self._batch(lambda batch=batch, targets=targets: self._score(batch, targets))
            for tokens, zeros, scores in zip(batch, record["zeros"], record["scores"], strict=True):
                for index, (score, greedy) in zip(rows[tokens], scores, strict=True):
                    answers[index] = (score, greedy)
                    counts = np.array(zeros, dtype=np.int64)
                    nothing = np.zeros_like(counts)
                    predicted = len(requests[index][2])
                    usage = Usage(len(tokens), counts, 0, nothing, -score, predicted)
                    self._credit(self._owners[index], usage)
        return answers

    def _score(
        self, batch: list[tuple[int, ...]], targets: list[list[list[int]]]
    ) -> dict[str, Any]:
        """Run one batch: zeros [row, slot] and, for each row, (log-probability, is greedy) by target."""
        lengths = torch.tensor([len(tokens) for tokens in batch])
        longest = int(lengths.max())
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, tokens in enumerate(batch):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
        valid = torch.arange(longest) < lengths[:, None]
        self._counter.expect(valid.to(self.device))
        logits = self._model_call(inputs.to(self.device))  # [batch, longest, vocabulary]
        sums, greedy, finite = [], [], []
        for row, conts in enumerate(targets):
            for cont in conts:
                end = len(batch[row])
                wanted = torch.tensor(cont, device=self.device)
                scores = F.log_softmax(
                    logits[row, end - len(cont) : end], dim=-1, dtype=self.softmax_dtype
                )
                sums.append(scores.gather(1, wanted[:, None]).sum())
                greedy.append((scores.argmax(-1) == wanted).all())
                finite.append(torch.isfinite(sums[-1]))
        zeros = self._counter.take()[0]  # [slots, batch]
        if not torch.stack(finite).all():
            raise NumericalFailure("NaN or infinity in the logits")
        flat = iter(
            zip(torch.stack(sums).float().tolist(), torch.stack(greedy).tolist(), strict=True)
        )
        return {
            "zeros": zeros.T.tolist(),
            "scores": [[next(flat) for _ in conts] for conts in targets],
        }

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate until a stop sequence; see `HFLM.generate_until`."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        answers = [""] * len(requests)
        for group in groups.values():
            # HFLM sorts by the same key, so that a batch's rows stay in the order given here.
            group.sort(key=lambda index: (-lengths[index], requests[index].args[0]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                record = self._batch(
                    lambda batch=batch: self._generate([requests[index] for index in batch])
                )
                for row, index in enumerate(batch):
                    answers[index] = record["texts"][row]
                    usage = Usage(
                        record["prefill_tokens"][row],
                        np.array(record["prefill_zeros"][row], dtype=np.int64),
                        record["generation_tokens"][row],
                        np.array(record["generation_zeros"][row], dtype=np.int64),
                    )
                    self._credit(requests[index], usage)
        return answers

    def _generate(self, batch: list[Instance]) -> dict[str, Any]:
        options = normalize_gen_kwargs(batch[0].args[1], self.max_gen_toks)
        for key in ("num_beams", "num_return_sequences"):
            if options.get(key, 1) != 1:
                raise AtlasError(
                    f"tasks: '{batch[0].task_name}': generation_kwargs: {key}: {options[key]} "
                    "found, only 1 is supported"
                )
        if options.get("do_sample"):
            # Sampling must not depend on where an earlier run was cut.
            torch.manual_seed(len(self._journal.records))
        self._logits = _LogitsWatch()
        try:
            texts = super().generate_until(batch, disable_tqdm=True)
        except RuntimeError:
            # Nothing can be drawn from NaN; what follows says where it came from.
            if not self._logits.broken:
                raise
        zeros = self._counter.take()  # [passes, slots, batch]
        if self._logits.broken:
            raise NumericalFailure("NaN or infinity in the logits")
        # Pass s > 0 feeds a row's generated token s, which a row that finished before does not have.
        fed = np.minimum(np.maximum(self._finished_at - 1, 0), len(zeros) - 1)
        counts = np.arange(1, len(zeros))[:, None] <= fed  # [passes - 1, batch]
        return {
            "texts": texts,
            "prefill_tokens": self._prompt_tokens,
            "prefill_zeros": zeros[0].T.tolist(),
            "generation_tokens": fed.tolist(),
            "generation_zeros": (zeros[1:] * counts[:, None]).sum(0).T.tolist(),
        }

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """As `HFLM._model_generate`, noting which tokens are padding and when each row finished."""
        mask = generation_kwargs["attention_mask"].bool()
        self._prompt_tokens = mask.sum(1).tolist()
        generation_kwargs["temperature"] = generation_kwargs.get("temperature", 0.0)
        cold = generation_kwargs["temperature"] == 0.0
        if cold and generation_kwargs.setdefault("do_sample", False) is False:
            # Greedy decoding; transformers warns of a temperature beside it.
            del generation_kwargs["temperature"]
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        watch = _FinishWatch(stops, self._end_tokens(), context.shape)
        self._counter.expect(mask, generates=True)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([*stops, watch]),
                logits_processor=LogitsProcessorList([self._logits]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **generation_kwargs,
            )
        generated = output.shape[1] - context.shape[1]
        self._finished_at = np.where(watch.finished_at > 0, watch.finished_at, generated)
        return output

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


class _FinishWatch(StoppingCriteria):
    """Notes at which generated token each row met a stop string or the end token; stops nothing."""

    def __init__(self, stops: StoppingCriteriaList, ends: set[int], shape: torch.Size) -> None:
        self.stops = stops
        self.ends = ends
        self.prompt = shape[1]
        self.finished_at = np.zeros(shape[0], dtype=np.int64)  # 0: not yet

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, last in enumerate(input_ids[:, -1].tolist()):
            stopped = last in self.ends or any(stop.done_tracker[row] for stop in self.stops)
            if stopped and self.finished_at[row] == 0:
                self.finished_at[row] = input_ids.shape[1] - self.prompt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _LogitsWatch(LogitsProcessor):
    """Notes whether NaN or infinity came up in the logits; changes nothing."""

    def __init__(self) -> None:
        self.broken: bool | Tensor = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity is how transformers forbids a token.
        self.broken = self.broken | ~(scores < torch.inf).all()
        return scores
