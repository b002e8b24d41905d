"""From a model's entry of the configuration to its files: a local folder, or the Hub's, fetched."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading import contents
from sparsity_atlas.loading.adapter import ADAPTER, PICKLED_ADAPTER, SAFE_ADAPTER
from sparsity_atlas.loading.checkpoint import (
    PICKLE_FILE,
    PICKLE_INDEX,
    SAFE_FILE,
    SAFE_INDEX,
    Checkpoint,
    shards,
)
from sparsity_atlas.loading.hub import Repository
from sparsity_atlas.loading.layouts import layout_in

# What a model's entry may say of its files.
ALLOWED = ("trust_remote_code", "allow_pickle", "dequantise")


def resolve(
    source: dict[str, Any],
    *,
    recorded: dict[str, Any] | None = None,
    offline: bool = False,
    weights: bool = True,
) -> tuple[Checkpoint, str | None]:
    """A model's files: its local folder, or the Hub's snapshot in the cache (`HF_HOME`).

    Args:
        source: as `grid.fetch_slice` gives it: `path`, or `hub` and `revision`, and what is allowed;
            `tokenizer`, the folder of another tokenizer; `adapter`, that of an adapter, or `adapter_hub` and
            `adapter_revision`; `gguf`, a file in the folder or repository, or by itself.
        recorded: an earlier manifest, whose commits are used in place of the source's own revisions.
        offline: use the cache only.
        weights: whether the Hub's weights are needed, too.

    Returns:
        The files, and the commit; None for a local folder.

    Raises:
        AtlasError: no such folder, or the Hub does not give what is needed.
    """
    allowed = {key: source.get(key, False) for key in ALLOWED}
    inside = source.get("gguf")
    if "path" in source or "hub" not in source:
        folder, commit = Path(source.get("path", "")), None
        if not os.path.isdir(folder):
            is_file = os.path.isfile(folder)
            what = (
                "a file; name its folder, and a GGUF file by `gguf`"
                if is_file
                else "no such folder"
            )
            raise AtlasError(f"models: {folder}: {what}")
    else:
        revision = recorded["revision"] if recorded else source.get("revision", "main")
        wanted = Repository("models", "model", source["hub"], revision)
        commit = wanted.commit(offline=offline)
        repository = replace(wanted, revision=commit)
        if inside is not None:
            folder = repository.fetch([inside], exceptions=(), offline=offline or not weights)
        for pair in contents.patterns(code=False) if inside is None else ():
            folder = repository.fetch(*pair, offline=offline)
        if inside is None and allowed["trust_remote_code"] and layout_in(folder) is None:
            for pair in contents.patterns(code=True):
                repository.fetch(*pair, offline=offline)
            if named := contents.named_by_code(folder):
                wanted_too = [pattern for name in sorted(named) for pattern in (name, f"*/{name}")]
                repository.fetch(wanted_too, exceptions=(), offline=offline)
        if weights and inside is None:
            _fetch_weights(repository, folder, allowed["allow_pickle"], offline)
    tokenizer = Path(source["tokenizer"]) if "tokenizer" in source else None
    if tokenizer is not None and not os.path.isdir(tokenizer):
        raise AtlasError(f"models: tokenizer: {tokenizer}: no such folder")
    file = None if inside is None else folder / inside
    checkpoint = Checkpoint(
        folder if file is None else file.parent,
        **allowed,
        tokenizer=tokenizer,
        gguf=None if file is None else file.name,
    )
    if "adapter" in source or "adapter_hub" in source:
        adapter, revision = _adapter(source, recorded, offline, allowed["allow_pickle"])
        checkpoint = replace(checkpoint, adapter=adapter, adapter_revision=revision)
    code = checkpoint.code_repository() if checkpoint.trust_remote_code else None
    if code is None:
        return checkpoint, commit
    revision = recorded["code"]["revision"] if recorded else source.get("code_revision", "main")
    wanted = Repository("models: trust_remote_code", "model", code, revision)
    revision = wanted.commit(offline=offline)
    replace(wanted, revision=revision).fetch(["*.py"], offline=offline)
    return replace(checkpoint, code_revision=revision), commit


def _adapter(
    source: dict[str, Any], recorded: dict[str, Any] | None, offline: bool, pickles: bool
) -> tuple[Path, str | None]:
    """The folder of a model's adapter, and its commit on the Hub; None for a local folder."""
    if "adapter" in source:
        if not os.path.isdir(source["adapter"]):
            raise AtlasError(f"models: adapter: {source['adapter']}: no such folder")
        return Path(source["adapter"]), None
    wanted = recorded["adapter"]["revision"] if recorded else source.get("adapter_revision", "main")
    repository = Repository("models: adapter", "model", source["adapter_hub"], wanted)
    commit = repository.commit(offline=offline)
    files = [ADAPTER, SAFE_ADAPTER, *([PICKLED_ADAPTER] if pickles else [])]
    return replace(repository, revision=commit).fetch(files, offline=offline), commit


def _fetch_weights(repository: Repository, folder: Path, pickles: bool, offline: bool) -> None:
    """Bring the weights to a snapshot whose other files are there: one format of them, not all."""
    kinds = [(SAFE_FILE, SAFE_INDEX), *([(PICKLE_FILE, PICKLE_INDEX)] if pickles else [])]
    for file, index in kinds:
        wanted = [file, *shards(folder / index)]
        repository.fetch(wanted, offline=offline)
        if any((folder / name).is_file() for name in wanted):
            return
