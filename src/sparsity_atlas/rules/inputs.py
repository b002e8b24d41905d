"""What the configuration names outside of itself, looked at before anything runs.

Local files are part of what a job depends on: their digests go into the rules' `params`, so that an
edited file reruns what it feeds, while a fresh checkout with new time stamps reruns nothing.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from sparsity_atlas import criteria
from sparsity_atlas.activations.text_files import kind_of
from sparsity_atlas.config import grid
from sparsity_atlas.config.model_entry import ModelEntry
from sparsity_atlas.config.schema import Config
from sparsity_atlas.criteria import dense_prompt
from sparsity_atlas.criteria.in_experts import check_keys
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest, file_digest
from sparsity_atlas.loading import contents
from sparsity_atlas.loading.adapter import adapter_digest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.tasks import local_files
from sparsity_atlas.tasks.yaml_tasks import output_types
from sparsity_atlas.terms import (
    ALLOCATIONS,
    BY_PROJECTION,
    FFN_SITES,
    SPELLED,
    by_projection,
    in_every_layer,
    plain,
    tensors_at,
)
from sparsity_atlas.truthfulness.answered import CHOICE, WRITTEN, not_answered

# Where the configuration names local files: catalogue and key.
_PATHS = (
    *(("models", "path"), ("models", "tokenizer"), ("models", "adapter"), ("models", "gguf")),
    *(("criteria", "file"), ("texts", "file"), ("tasks", "include")),
)


def locate(data: dict[str, Any], workflow: Path) -> dict[str, Any]:
    """Find relative paths that lie beside the workflow, not in the working directory.

    So the embedded models, texts and tasks are found under `snakemake --directory elsewhere`, too.

    Args:
        data: the merged configuration, not yet validated.
        workflow: folder of the Snakefile.
    """
    found = dict(data)
    for catalogue, key in _PATHS:
        entries = found.get(catalogue)
        if isinstance(entries, dict):
            found[catalogue] = {
                name: {**entry, key: _beside(entry[key], workflow)}
                if isinstance(entry, dict) and isinstance(entry.get(key), str)
                else entry
                for name, entry in entries.items()
            }
    return found


def _beside(path: str, workflow: Path) -> str:
    # One spelling, so that a slash at the end is no other model to Snakemake.
    path = os.path.expanduser(path.rstrip("/") or path)
    # os.path takes a name that no file can have for that of no file; Path raises.
    if os.path.isabs(path) or os.path.exists(path) or not os.path.exists(workflow / path):
        return path
    return os.path.relpath(workflow / path)


def check_inputs(config: Config) -> None:
    """Check what can be checked without loading a model or lm-eval.

    Raises:
        AtlasError: an unknown rule, a site or a level that it does not have, or a file that is
            missing or not YAML.
    """
    grid.checkpoints(config)
    curves = grid.curves(config)
    specs = {curve.criterion: grid.criterion_slice(config, curve.criterion) for curve in curves}
    declared = {name: criteria.declared(json.loads(spec)) for name, spec in specs.items()}
    for curve in curves:
        constants = declared[curve.criterion]
        low, high, sites = (constants[name] for name in ("lowest", "highest", "sites"))
        if by_projection(curve.site) and plain(curve.site) not in BY_PROJECTION:
            raise AtlasError(
                f"run: by_projection: one map reads '{plain(curve.site)}'; several read something at "
                f"{', '.join(BY_PROJECTION)}"
            )
        if in_every_layer(curve.site) not in SPELLED:
            raise AtlasError(
                f"run: parts: '{plain(curve.site)}' is a site of attention, or of both; parts choose "
                f"among what stands beside it, at {', '.join(FFN_SITES)}"
            )
        if sites and plain(curve.site) not in sites:
            raise AtlasError(
                f"run: sites: '{curve.criterion}' is not defined at '{plain(curve.site)}'; its sites are "
                f"{', '.join(sites)}"
            )
        if constants["calibrated"]:
            _check_calibration(config, curve)
        spec = json.loads(specs[curve.criterion])
        check_keys(f"criteria.{curve.criterion}", spec, constants["calibrated"])
        dense_prompt.read(f"criteria.{curve.criterion}", spec)
        if "file" not in spec:
            _check_allocation(spec, curve, constants["allocated"])
        for key, level in [
            *(("levels", level) for level in curve.levels),
            *(("sensitivity", level) for level in curve.sensitivity),
        ]:
            if not low <= float(level) <= high:
                raise AtlasError(
                    f"run: {key}: {level} is out of range for '{curve.criterion}' ({low:g} to {high:g})"
                )
    # A user's own may keep prompts' masks, too.
    may = any(
        "file" in json.loads(spec) or grid.keeps_prompts(config, name)
        for name, spec in specs.items()
    )
    if config.studies.prompt_reuse and not may:
        raise AtlasError(
            "studies: prompt_reuse: no criterion of the run takes a prompt's mask for what follows it; "
            f"{' and '.join(grid.PROMPT_RULES)} do"
        )
    _check_truthfulness(config, declared)
    for name, entry in config.tasks.items():
        if entry.include is not None and not os.path.isdir(entry.include):
            raise AtlasError(f"tasks.{name}: include: {entry.include}: no such folder")
        task_content(config, (name,))
    text = config.texts[config.capture.text]
    if text.file is not None and not os.path.isfile(text.file):
        raise AtlasError(f"texts.{config.capture.text}: file: {text.file}: no such file")
    if text.file is not None:
        kind_of(Path(text.file))


def _check_truthfulness(config: Config, declared: dict[str, dict[str, Any]]) -> None:
    asked, key = config.studies.truthfulness, "studies.truthfulness"
    for model, task in grid.truthfulness(config):
        if config.models[model].diffusion is not None:
            raise AtlasError(
                f"{key}.models: '{model}' fills masks in, and its tokens see those behind them; name the "
                "causal ones"
            )
        entry = config.tasks[task]
        kinds = output_types(entry.include, entry.task or task, entry.override)
        if kinds and (others := kinds - {CHOICE, WRITTEN}):
            raise AtlasError(not_answered(task, others))
    for node in asked.nodes if asked is not None else ():
        criterion, site, level = node.split("/")
        constants = declared.get(criterion) or criteria.declared(
            json.loads(grid.criterion_slice(config, criterion))
        )
        if constants["sites"] and plain(site) not in constants["sites"]:
            raise AtlasError(
                f"{key}.nodes: {node}: '{criterion}' is not defined at '{plain(site)}'"
            )
        if not constants["lowest"] <= float(level) <= constants["highest"]:
            raise AtlasError(f"{key}.nodes: {node}: the level is out of range for '{criterion}'")
        if constants["calibrated"] and config.calibration is None:
            raise AtlasError(
                f"{key}.nodes: {node}: '{criterion}' is calibrated; say on how many captured tokens, for "
                "instance calibration: {tokens: 4096}"
            )


def _check_allocation(spec: dict[str, Any], curve: grid.Curve, allocated: bool) -> None:
    allocation = spec.get("allocation", "uniform")
    if "allocation" in spec and not allocated:
        raise AtlasError(f"criteria.{curve.criterion}: allocation: this rule takes none")
    if allocation not in ALLOCATIONS:
        raise AtlasError(
            f"criteria.{curve.criterion}: allocation: expected {', '.join(ALLOCATIONS)}, "
            f"found {allocation!r}"
        )
    if allocation == "greedy" and len(tensors_at(curve.site)) == 1:
        raise AtlasError(
            f"run: sites: '{curve.criterion}' is allocated greedily among the tensors of a block, and "
            f"'{curve.site}' is one; use it at all_inputs or all_linear_inputs"
        )


def _check_calibration(config: Config, curve: grid.Curve) -> None:
    """A calibrated criterion must not have seen what it is evaluated on.

    Here by files and documents; `evaluate` compares the texts themselves.
    """
    if config.calibration is None:
        raise AtlasError(
            f"run: criteria: '{curve.criterion}' is calibrated; say on how many captured tokens, for "
            "instance calibration: {tokens: 4096}"
        )
    text = config.texts[config.capture.text]
    first, end = text.documents or (0, None)
    if text.file is None:
        return
    for task in curve.tasks:
        entry = config.tasks[task]
        files = local_files.find(entry.include, entry.task or task, entry.override).all()
        if Path(text.file).resolve() not in {path.resolve() for path in files}:
            continue
        if entry.limit is None or first < entry.limit:
            used = f"first {entry.limit} documents" if entry.limit else "documents"
            seen = f"documents {first} to {end}" if end else f"documents {first} to the last"
            raise AtlasError(
                f"tasks.{task}: '{curve.criterion}' is calibrated on {seen} of {text.file}, and "
                f"this task evaluates its {used}; part them by texts.{config.capture.text}.documents "
                f"and tasks.{task}.limit"
            )


@functools.cache
def _model_digest(checkpoint: Checkpoint) -> str:
    checkpoint.config()
    return checkpoint.digest()


def model_content(config: Config, model: str) -> str:
    """Digest of a model's local files; empty for the Hub, where the revision says all.

    A folder that cannot be used is left to the job, whose failure stays that model's own.
    """
    entry = config.models[model]
    other = Path(entry.tokenizer) if entry.tokenizer is not None else None
    adapter = Path(entry.adapter) if entry.adapter is not None else None
    if entry.hub is not None:
        return _beside_the_hub(other, adapter, entry)
    file = Path(entry.path or "", entry.gguf) if entry.gguf is not None else None
    folder = Path(entry.path or "") if file is None else file.parent
    if not os.path.isdir(folder):
        return ""
    try:
        return _model_digest(
            Checkpoint(
                folder,
                trust_remote_code=entry.trust_remote_code,
                allow_pickle=entry.allow_pickle,
                dequantise=entry.dequantise,
                tokenizer=other,
                adapter=adapter,
                gguf=None if file is None else file.name,
            )
        )
    except AtlasError as error:
        return str(error)


def _beside_the_hub(tokenizer: Path | None, adapter: Path | None, entry: ModelEntry) -> str:
    """Digest of the local folders that a model of the Hub is given; empty without any."""
    found: dict[str, Any] = {}
    if tokenizer is not None and tokenizer.is_dir():
        found |= contents.files_digest(tokenizer, code=entry.trust_remote_code)
    if adapter is not None:
        try:
            found["adapter"] = adapter_digest(adapter, pickles=entry.allow_pickle)
        except AtlasError as error:
            return str(error)
    return digest(found) if found else ""


def text_content(config: Config) -> str:
    """Digest of the local text for capture; empty for a Hub data set."""
    text = config.texts[config.capture.text]
    return file_digest(Path(text.file)) if text.file is not None else ""


def task_content(config: Config, tasks: tuple[str, ...]) -> str:
    """Digests of the local files of some tasks."""
    entries = ((config.tasks[name], name) for name in tasks)
    return ",".join(
        local_files.files_digest(entry.include, entry.task or name, entry.override)
        for entry, name in entries
    )
