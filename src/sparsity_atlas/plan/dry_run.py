"""Evaluate without a forward pass, to learn what an evaluation will have to compute.

lm-eval builds the real requests of the real documents, the model's own tokenizer reads them, and our
own language model cuts, merges and batches them; only the model's numbers are missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from sparsity_atlas.config import grid
from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.lm import forest
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.lm.journalled import JournalledLM, Records, shortest
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.lm.usage import packed
from sparsity_atlas.sparsify.attach import Counter
from sparsity_atlas.sparsify.counted_vectors import Slot
from sparsity_atlas.tasks.load import load_tasks
from sparsity_atlas.terms import DENOISING, GENERATION, PROMPT, SCORING

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.config.schema import Config
    from sparsity_atlas.lm.work import Arranged, Work
    from sparsity_atlas.tasks.loaded import LoadedTask


def loadable_tasks(
    config: Config, note: Callable[[str, BaseException | str], None]
) -> dict[str, LoadedTask]:
    """The tasks of the run, without those that cannot be loaded here, of which it is noted why."""
    used = {name for model in grid.models(config) for name in grid.model_tasks(config, model)}
    entries = {
        name: entry.model_dump(exclude_none=True, exclude_defaults=True)
        for name, entry in config.tasks.items()
        if name in used
    }
    loaded = load_tasks(entries, config.seed, lambda name, reason: note(f"task {name}", reason))
    problems = {name: task.problem for name, task in loaded.items() if task.problem}
    for name, problem in problems.items():
        note(f"task {name}", problem)
    return {name: task for name, task in loaded.items() if name not in problems}


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        rows: token ids of each row, without padding.
        predicted: for each row how many tokens' successors are predicted.
        steps: passes of one token a row that follow at most, in generation.
    """

    rows: list[list[int]]
    predicted: list[int]
    steps: int = 0

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return len(self.rows) * max(map(len, self.rows))


@dataclass(frozen=True)
class TaskCost:
    """What one evaluation of a task takes.

    Attributes:
        documents: rows of the sample table.
        requests: tokens of all requests, as eval.json will count them; of a masked-diffusion model those of
            all rows and passes, in generation at most.
        generation: tokens that are generated and fed back, at most.
        positions: computed in all passes over requests; what requests share once, padding included.
        passes: over requests.
        steps: passes of generation, at most.
        sample: the batch in the middle of the positions.
        building: seconds until a process has the task's requests, which lie in the cache.
        overhead: seconds of an evaluation for all but the forward passes, with the requests at hand.
    """

    documents: int
    requests: int
    generation: int
    positions: int
    passes: int
    steps: int
    sample: Batch
    building: float
    overhead: float


class Dry(JournalledLM):
    """Answers at once.

    Attributes:
        batches: the forward passes that it was spared, since `start`.
        kind: of the device that the passes are meant for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.kind = kind
        self._device = torch.device("cpu")  # the model may have no weights, and so no device

    @property
    def shortest(self) -> int:
        """See `JournalledLM.shortest`."""
        return shortest(self.kind, self._hidden, self.max_length)

    def start(self, journal: Records, counter: Counter, work: Arranged) -> None:
        """Begin a task; see `JournalledLM.start`."""
        super().start(journal, counter, work)
        self.batches: list[Batch] = []


class DryLM(Dry, AtlasLM):
    """A causal model: every log-probability is 0, every generated text empty."""

    def _follows(self, requests: list[forest.Request], prompts: list[Any]) -> bool:
        return False

    def _try_generation(self, work: Work, generated: list[Instance]) -> None:
        """Try nothing: without weights there are no numbers, and no count depends on them."""

    def _abilities(self, requests: list[forest.Request], branching: bool) -> Abilities:
        return Abilities(branches=branching, selects=True)  # as nearly every model

    def _score(self, batch: forest.Batch) -> Callable[[], dict[str, Any]]:
        longest = batch.tokens.shape[1]
        rows = [
            row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)
        ]
        predicted = np.bincount(batch.scored // longest, minlength=len(rows)).tolist()
        self.batches.append(Batch(rows, predicted))
        count = len(batch.requests)
        return lambda: {
            **dict.fromkeys(("zeros", "unique"), packed(np.zeros(0))),  # no slot is counted
            **{"scores": [0.0] * count, "greedy": [False] * count},
        }

    def generate(self, batch: list[Instance], seed: int, once: list[bool]) -> dict[str, Any]:
        """Prepare a batch of generation; see `GeneratingLM.generate`."""
        texts = HFLM.generate_until(self, batch, disable_tqdm=True)
        rows = self.batches[-1].rows
        nothing: list[list[int]] = [[]] * len(rows)
        return {
            "texts": texts,
            "unfinished": [False] * len(rows),
            "prompt_tokens": [len(row) for row in rows],
            "prompt_zeros": nothing,
            "generation_tokens": [self.batches[-1].steps] * len(rows),
            "generation_zeros": nothing,
        }

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        mask = generation_kwargs["attention_mask"].bool()
        rows = [row[keep].tolist() for row, keep in zip(context, mask, strict=True)]
        # The last generated token is not fed back.
        steps = max(max_length - context.shape[1] - 1, 0)
        self.batches.append(Batch(rows, [1] * len(rows), steps))
        return context


class _DrySession(Session):
    """A session whose model has no sites to attach to."""

    def slots(self, node: Node | None) -> list[Slot]:
        return []

    def attach(self, node: Node | None) -> contextlib.AbstractContextManager[Counter]:
        return contextlib.nullcontext(Counter([]))


def count(lm: Dry, task: LoadedTask, *, seed: int, folder: Path) -> TaskCost:
    """Go through one task.

    Args:
        lm: with the tokenizer and the settings of the model.
        task: the task.
        seed: of few-shot draws.
        folder: for files that nobody needs afterwards.

    Raises:
        TaskFailure: the evaluation would fail as well.
    """
    # The first builds the requests, as only the first job does that needs them.
    _DrySession(lm, [], {task.name: task}, seed, {}).prepared(task.name)
    session = _DrySession(lm, [], {task.name: task}, seed, {})
    began = time.perf_counter()
    session.prepared(task.name)
    built = time.perf_counter()
    result = evaluate_node(session, None, folder / task.name)["tasks"][task.name]
    overhead = time.perf_counter() - built
    if result["status"] == "failed":
        raise TaskFailure(result["reason"])
    tokens = result["tokens"]
    ends = list(accumulate(batch.positions for batch in lm.batches))
    middle = int(np.searchsorted(ends, ends[-1] / 2))
    return TaskCost(
        documents=result["items"],
        requests=tokens[SCORING] + tokens[PROMPT] + tokens[DENOISING],
        generation=tokens[GENERATION],
        positions=ends[-1],
        passes=len(ends),
        steps=sum(batch.steps for batch in lm.batches),
        sample=lm.batches[middle],
        building=built - began,
        overhead=overhead,
    )
