"""A loaded model with its tasks: what every node of that model shares."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.criteria.calibration_file import Calibration, check_disjoint
from sparsity_atlas.evaluation.ahead import Ahead, builders
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.sites.part import Part, chosen
from sparsity_atlas.terms import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.evaluation.node import Node
    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.lm.work import Arranged
    from sparsity_atlas.loading.checkpoint import Checkpoint
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.tasks.loaded import LoadedTask
    from sparsity_atlas.tasks.prepared import Prepared


@dataclass
class Session:
    """A loaded model with its tasks: what every node of that model shares.

    Attributes:
        identity: all but the node and the task that a result depends on; goes into fingerprints.
        ahead: what builds the tasks' requests beside this process.
        keep_texts: whether prompts and answers are kept beside the samples.
    """

    lm: JournalledLM
    parts: list[Part]
    tasks: dict[str, LoadedTask]
    seed: int
    identity: dict[str, Any]
    ahead: Ahead = field(default_factory=Ahead)
    keep_texts: bool = False
    _prepared: dict[tuple[str, bool], Prepared] = field(default_factory=dict)
    _disjoint: set[str] = field(default_factory=set)  # digests of calibration texts
    _metrics: set[tuple[str, str | None]] = field(default_factory=set)  # that were looked at

    @classmethod
    def open(cls, manifest_path: Path, settings: dict[str, Any], code: str) -> Session:
        """Load a model and its tasks.

        Args:
            manifest_path: the model's manifest.
            settings: as `grid.evaluation_slice` gives it.
            code: code version of the evaluation.

        Raises:
            AtlasError: model or tasks cannot be used.
        """
        manifest, checkpoint = from_manifest(manifest_path, kinds=KINDS)
        from sparsity_atlas.models.memory import Sizes
        from sparsity_atlas.models.positions import check_positions
        from sparsity_atlas.sites.find import bind_parts
        from sparsity_atlas.tasks.load import load_tasks

        tasks = load_tasks(settings["tasks"], settings["seed"])
        # Before the weights: while they are loaded, requests are built beside.
        tokenizer = load_tokenizer(checkpoint, add_bos_token=settings["add_bos_token"])
        count = builders(settings["device"], len(tasks))
        empty = partial(_without_weights, manifest, checkpoint, tokenizer, settings)
        ahead = Ahead.begin(empty, tasks, settings["seed"], count) if count else Ahead()
        model = load(checkpoint, **how(settings))
        lm = _language_model(manifest, model, tokenizer, settings)
        lm.remember(manifest["digest"])
        lm.sizes = Sizes.of(manifest)
        check_positions(model, lm.max_length, f"models.{manifest['name']}: max_length")
        identity = {
            "model": manifest["digest"],
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": settings["batch_size"],
            "max_length": lm.max_length,
            **({"batched_as": lm.shortest} if lm.shortest else {}),
            **lm.identity(),
            "code": code,
        }
        parts = bind_parts(model, manifest["ffn"])
        keep_texts = settings.get("keep_texts", False)
        return cls(lm, parts, tasks, settings["seed"], identity, ahead, keep_texts)

    def with_code(self, code: str) -> Session:
        """The same model and tasks, for results of another code version: another criterion's."""
        return replace(self, identity={**self.identity, "code": code})

    def prepared(self, name: str, *, share: bool = True) -> Prepared:
        """A task with its requests, which are built when they are first asked for.

        Args:
            name: of the task.
            share: whether requests may share what they have in common.
        """
        key = (name, share)
        if key not in self._prepared:
            from sparsity_atlas.tasks.prepared import prepare

            task = self.tasks[name]
            self.ahead.wait(name, self.lm)
            with task.code("its requests cannot be built"):
                self._prepared[key] = prepare(self.lm, task, seed=self.seed, share=share)
        return self._prepared[key]

    def at_hand(self, name: str, *, share: bool = True) -> Arranged | None:
        """The batches of a task, if they are known without running the model or code of the task's own.

        Args:
            name: of the task.
            share: as of `prepared`.
        """
        key = (name, share)
        if key not in self._prepared:
            from sparsity_atlas.tasks.prepared import prepare_kept

            if not self.ahead.ready(name):
                return None
            self.ahead.wait(name, self.lm)
            found = prepare_kept(self.lm, self.tasks[name], seed=self.seed, share=share)
            if found is None:
                return None
            self._prepared[key] = found
        return self._prepared[key].work

    def slots(self, node: Node | None) -> list[Slot]:
        """What is counted."""
        from sparsity_atlas.sparsify.counted_vectors import slots_of

        at = (*chosen(self.parts, node.site), node.rule) if node else (self.parts, None, None)
        return slots_of(*at)

    def attach(self, node: Node | None) -> contextlib.AbstractContextManager[Counter]:
        """Sparsify the model as the node says; None counts exact zeros of the dense model."""
        from sparsity_atlas.sparsify.attach import counted, sparsified

        if node is None:
            return counted(self.lm.model, self.parts)
        states = node.calibration.states if node.calibration else None
        parts, site = chosen(self.parts, node.site)
        return sparsified(self.lm.model, parts, site, node.rule, float(node.level), states)

    def check_metric(self, name: str, wanted: str | None) -> None:
        """Refuse a metric that a task will not report of each document; looked at once.

        Raises:
            AtlasError: see `check_wanted`.
        """
        from sparsity_atlas.tasks.reported_metrics import check_wanted

        if (name, wanted) not in self._metrics:
            check_wanted(self.tasks[name], wanted)
            self._metrics.add((name, wanted))

    def check_disjoint(self, calibration: Calibration) -> None:
        """Refuse tasks that evaluate what a criterion was calibrated on; looked at once a text.

        Raises:
            AtlasError: names the task and the document.
        """
        if calibration.about["text"] in self._disjoint:
            return
        for name, task in self.tasks.items():
            for leaf in task.leaves.values():
                check_disjoint(calibration, name, islice(leaf.eval_docs, task.limit))
        self._disjoint.add(calibration.about["text"])


def _language_model(
    manifest: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> JournalledLM:
    from sparsity_atlas.lm.by_kind import language_model
    from sparsity_atlas.lm.prompts import PromptSettings

    return language_model(
        *(manifest, model, tokenizer),
        diffusion=settings.get("diffusion"),
        batch_size=settings["batch_size"],
        max_length=settings["max_length"],
        prompts=PromptSettings.of(settings),
    )


def _without_weights(
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> JournalledLM:
    """As much of the language model as makes and arranges requests."""
    import torch

    from sparsity_atlas.loading.pretrained import blank

    with torch.device("meta"):
        empty = blank(checkpoint)
    lm = _language_model(manifest, empty, tokenizer, settings)
    # Batches follow from the device that the passes are for.
    device = settings["device"]
    lm._device = torch.device("cuda" if device == "auto" else device)
    return lm
