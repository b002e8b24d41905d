"""What a configuration asks for: curves, nodes, and the slice of the configuration each job uses.

A job's slice holds all that the job depends on and nothing else, so that a change in the
configuration reruns what depends on it and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas.config import revisions
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.config.run_block import RunBlock
from sparsity_atlas.config.schema import Config
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.source import ALLOWED
from sparsity_atlas.terms import confined, plain

# Built-in rules that take a prompt's mask for what follows it.
PROMPT_RULES = ("prompt_mask", "tda")
# Those with one threshold for all layers.
GLOBAL_RULES = ("threshold", "weighted_threshold")
DEFAULT_SITES = ("intermediate", "input")


@dataclass(frozen=True)
class Curve:
    """A (model, criterion, site as paths spell it) with the levels and tasks that the run blocks ask of it.

    sensitivity: levels at which one layer at a time is sparsified.
    """

    model: str
    criterion: str
    site: str
    auto: bool
    levels: tuple[str, ...]
    tasks: tuple[str, ...]
    sensitivity: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Path below the results folder."""
        return f"{self.model}/{self.criterion}/{self.site}"


def block_sites(config: Config, block: RunBlock, model: str) -> tuple[str, ...]:
    """Sites that a block asks of a model, as paths spell them."""
    sites = block.sites or config.models[model].sites or DEFAULT_SITES
    return tuple(
        confined(site, block.parts or (), layers, each=block.by_projection)
        for site in sites
        for layers in _layers(block)
    )


def _layers(block: RunBlock) -> Iterator[tuple[int, ...]]:
    """The sets of layers that a block sparsifies, each by itself; an empty one stands for every layer."""
    together = [one for one in block.layers or () if isinstance(one, int)]
    each = [tuple(one) for one in block.layers or () if isinstance(one, list)]
    yield from each or [tuple(together)]


def curves(config: Config) -> list[Curve]:
    """Every curve of the run; blocks that share one are merged (levels and tasks united)."""
    merged: dict[tuple[str, str, str], dict[str, Any]] = {}
    for block in config.run:
        for model in block.models:
            for criterion in block.criteria:
                for site in block_sites(config, block, model):
                    curve = merged.setdefault(
                        (model, criterion, site),
                        {"auto": False, "levels": {}, "tasks": {}, "sensitivity": {}},
                    )
                    if block.levels == "auto":
                        curve["auto"] = True
                    else:
                        curve["levels"].update(dict.fromkeys(block.levels))
                    curve["tasks"].update(dict.fromkeys(block.tasks or config.tasks))
                    curve["sensitivity"].update(dict.fromkeys(block.sensitivity or ()))
    return [
        Curve(
            *key,
            curve["auto"],
            _by_value(curve["levels"]),
            _in_order(config, curve["tasks"]),
            _by_value(curve["sensitivity"]),
        )
        for key, curve in merged.items()
    ]


def _by_value(levels: dict[str, None]) -> tuple[str, ...]:
    return tuple(sorted(levels, key=float, reverse=True))


def _in_order(config: Config, names: dict[str, None]) -> tuple[str, ...]:
    """Tasks in the order of the catalogue, so that the order of blocks changes nothing."""
    return tuple(name for name in config.tasks if name in names)


def models(config: Config) -> tuple[str, ...]:
    """Models of the run, in the order of the catalogue."""
    used = {curve.model for curve in curves(config)}
    return tuple(name for name in config.models if name in used)


def checkpoints(config: Config) -> dict[str, Checkpoint]:
    """Those models of the run that are checkpoints of a series.

    Raises:
        AtlasError: it is not known how many tokens one was trained on.
    """
    return dict(revisions.checkpoints(config.models, models(config)))


def pairs(config: Config) -> tuple[tuple[str, str], ...]:
    """Pairs of `compare` of which the run has curves of both at one criterion and site."""
    places: dict[str, set[tuple[str, str]]] = {}
    for curve in curves(config):
        places.setdefault(curve.model, set()).add((curve.criterion, curve.site))
    return tuple(
        (first, second)
        for first, second in config.compare
        if places.get(first, set()) & places.get(second, set())
    )


def model_tasks(config: Config, model: str) -> tuple[str, ...]:
    """Tasks of a model's dense baseline: those of all its curves."""
    names = {task: None for curve in curves(config) if curve.model == model for task in curve.tasks}
    return _in_order(config, names)


def model_sites(config: Config, model: str) -> tuple[str, ...]:
    """Sites of all curves of a model, as paths spell them, each once."""
    return tuple(dict.fromkeys(curve.site for curve in curves(config) if curve.model == model))


def stored_sites(config: Config, model: str) -> tuple[str, ...]:
    """Sites whose activations are captured for these: of all parts, each once."""
    return tuple(dict.fromkeys(plain(site) for site in model_sites(config, model)))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fetch_slice(config: Config, model: str) -> str:
    """What `models` depends on: where the model comes from and how its FFN is named."""
    entry = config.models[model]
    allowed = {key for key in ALLOWED if getattr(entry, key)}
    keys = {"path", "hub", "revision", "code_revision", "tokenizer", "modules", *allowed}
    keys |= {"adapter", "adapter_hub", "adapter_revision", "gguf"}
    keys |= {"mask_token_id", "shifted_logits", "device_map"}
    found = entry.model_dump(include=keys, exclude_none=True)
    if "gguf" in found and not {"path", "hub"} & found.keys():
        # One way to say it: a file in a folder.
        folder, found["gguf"] = os.path.split(found["gguf"])
        found["path"] = folder or "."
    return _json(found)


def loading_slice(config: Config, model: str) -> dict[str, Any]:
    """How a model is loaded for computation."""
    entry = config.models[model]
    spread = entry.model_dump(include={"device_map"}, exclude_none=True)
    return {"dtype": entry.dtype, "device": config.device, **spread}


def capture_slice(config: Config, model: str) -> str:
    """What `capture` depends on."""
    capture = config.capture
    entry = config.models[model]
    return _json(
        {
            **loading_slice(config, model),
            "text": config.texts[capture.text].model_dump(exclude_none=True),
            "tokens": capture.tokens,
            "sequence_length": capture.sequence_length,
            "batch_size": entry.batch_size,
            "add_bos_token": entry.add_bos_token,
        }
    )


def calibration_tokens(config: Config) -> int:
    """Captured tokens that calibrations look at; 0 without any."""
    return config.calibration.tokens if config.calibration is not None else 0


def store_slice(config: Config, model: str) -> str:
    """What a stage depends on that loads a model beside its captured activations."""
    return _json({**loading_slice(config, model), "calibration_tokens": calibration_tokens(config)})


def error_slice(config: Config, model: str) -> str:
    """What `output_error` depends on beside its criterion, site and levels."""
    studies = config.studies.model_dump(
        include={"predictors", "cett", "coactivation"}, exclude_none=True
    )
    asked = config.studies.prompt_reuse
    if asked is not None:
        studies |= {"prompt_reuse": asked, "batch_size": config.models[model].batch_size}
        studies |= {"replicates": config.replicates, "seed": config.seed}
    return _json({**json.loads(store_slice(config, model)), **studies})


def truthfulness(config: Config) -> tuple[tuple[str, str], ...]:
    """Models and tasks whose answers are studied."""
    asked = config.studies.truthfulness
    if asked is None:
        return ()
    return tuple(
        (model, task)
        for model in models(config)
        if model in (asked.models or config.models)
        for task in model_tasks(config, model)
        if task in asked.tasks
    )


def answers_slice(config: Config, task: str) -> str:
    """What `answers` depends on beside the evaluation of its task."""
    asked = config.studies.truthfulness
    content = asked.model_dump(include={"tensors", "samples"}) if asked is not None else {}
    return _json({**content, "metric": config.tasks[task].metric})


def truthfulness_slice(config: Config) -> str:
    """What `truthfulness` depends on beside the answers and the nodes."""
    asked = config.studies.truthfulness
    content = asked.model_dump(include={"neighbours"}) if asked is not None else {}
    return _json({**content, "replicates": config.replicates, "seed": config.seed})


def sensitivity_slice(config: Config, model: str) -> str:
    """What `sensitivity` depends on beside its criterion, site and levels."""
    return _json(
        {
            **loading_slice(config, model),
            "batch_size": config.models[model].batch_size,
            "calibration_tokens": calibration_tokens(config),
            "replicates": config.replicates,
            "seed": config.seed,
        }
    )


def prompt_slice(config: Config, model: str) -> dict[str, Any]:
    """How prompts are made and continued, beside their special tokens."""
    entry = config.models[model]
    keys = {"system_instruction", "gen_kwargs", "think_end_token", "fewshot_as_multiturn"}
    found = entry.model_dump(include=keys, exclude_defaults=True)
    if not entry.apply_chat_template:
        return {"apply_chat_template": False, **found}
    return {
        "apply_chat_template": True,
        "chat_template_args": entry.chat_template_args,
        "chat_date": config.chat_date.isoformat(),
        **found,
    }


def evaluation_slice(config: Config, model: str, tasks: tuple[str, ...]) -> str:
    """What an evaluation depends on beside its criterion, site and level."""
    entry = config.models[model]
    return _json(
        {
            **loading_slice(config, model),
            **entry.model_dump(
                include={"batch_size", "max_length", "add_bos_token", "lm_eval_prefix"}
            ),
            **entry.model_dump(include={"diffusion"}, exclude_none=True),
            **prompt_slice(config, model),
            "seed": config.seed,
            **({"keep_texts": True} if config.keep_texts else {}),
            "tasks": {
                name: config.tasks[name].model_dump(
                    exclude_none=True,
                    exclude_defaults=True,
                    # Whose prompts they are does not make them others.
                    exclude={"metric": True, "inserted": {"before"}},
                )
                for name in tasks
            },
        }
    )


def metrics_slice(config: Config, tasks: tuple[str, ...]) -> str:
    """Which metric of each task makes its curve; null: the one that is taken where none is named."""
    return _json({name: config.tasks[name].metric for name in tasks})


def curve_slice(config: Config, tasks: tuple[str, ...]) -> str:
    """What a curve depends on: which metric of each task, the bars and the bootstrap."""
    return _json(
        {
            "seed": config.seed,
            "replicates": config.replicates,
            "bars": config.every_bar,
            "tasks": {name: _scored(config, name) for name in tasks},
        }
    )


def _scored(config: Config, task: str) -> dict[str, str]:
    """What a curve has to know of a task: its metric, and whose prompts it has with a text before them."""
    entry = config.tasks[task]
    known = {"metric": entry.metric, "before": entry.inserted and entry.inserted.before}
    return {key: value for key, value in known.items() if value}


def search_slice(config: Config, tasks: tuple[str, ...]) -> str:
    """What `search` depends on beside the evaluation itself."""
    metrics = {
        name: config.tasks[name].model_dump(exclude_none=True, include={"metric"}) for name in tasks
    }
    return _json({**config.search.model_dump(exclude_none=True), "tasks": metrics})


def criterion_slice(config: Config, criterion: str) -> str:
    """What a criterion is made from; its name in the catalogue is the default rule."""
    entry = config.criteria[criterion].model_dump(exclude_none=True)
    return _json(entry if "file" in entry else {"rule": criterion, **entry})


def keeps_prompts(config: Config, criterion: str) -> bool:
    """Whether a criterion takes a prompt's mask for what follows it; of a user's own it is not known here."""
    spec = json.loads(criterion_slice(config, criterion))
    return spec.get("rule") in PROMPT_RULES


def searched_levels(config: Config, results: str) -> dict[Curve, tuple[str, ...]]:
    """For each curve whose search has finished, the levels that it chose and no run block lists."""
    found = {}
    for curve in curves(config):
        search = Path(results, curve.folder, "search.json")
        if curve.auto and search.is_file():
            chosen = (one["level"] for one in read_manifest(search)["levels"])
            found[curve] = tuple(level for level in chosen if level not in curve.levels)
    return found
