"""Stage `models`: resolve a model, prove where its FFN sites are, and write its manifest.

The manifest is what later stages load the model by. It names the source as the configuration does
(no path of this machine), so that results can be moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.files.whole import file_digest, read_manifest, write_manifest
from sparsity_atlas.loading.adapter import describe_adapter
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.gguf_file import describe_gguf
from sparsity_atlas.loading.layouts import layout_of
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.loading.quantised import method_of
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.sites.available import Available
from sparsity_atlas.terms import CAUSAL, DIFFUSION, EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_atlas.sites.part import Part


def from_manifest(
    path: Path, *, kinds: Collection[str] = (CAUSAL,)
) -> tuple[dict[str, Any], Checkpoint]:
    """A model's manifest and its files, checked to be what the manifest was written for.

    Args:
        path: of the manifest.
        kinds: of models that can be used, of `terms.KINDS`.

    Raises:
        AtlasError: the files changed since, or are not there any more; an earlier version's manifest, or
            that of a model of another kind.
    """
    manifest = read_manifest(path)
    if "kind" not in manifest:
        raise AtlasError(
            f"{path}: expected `kind`, which this version needs, found none; delete that file and "
            "run again"
        )
    if manifest["kind"] not in kinds:
        from sparsity_atlas.models.causality import NOT_YET

        raise AtlasError(f"models.{manifest['name']}: {NOT_YET}")
    source = manifest["source"]
    try:
        checkpoint, _ = resolve(source, recorded=manifest, offline=True)
        found = checkpoint.digest()
    except AtlasError:
        if "path" in source:
            raise
        checkpoint, _ = resolve(source, recorded=manifest)  # the cache was emptied
        found = checkpoint.digest()
    if found != manifest["digest"]:
        raise AtlasError(
            f"{checkpoint}: changed since {path} was written; delete that file and run again"
        )
    return manifest, checkpoint


def describe(
    checkpoint: Checkpoint,
    modules: dict[str, str] | None,
    *,
    mask_token_id: int | None = None,
    shifted_logits: bool | None = None,
    device_map: str | None = None,
) -> dict[str, Any]:
    """Architecture, kind, sizes, tokenizer and proven sites of a model, as its manifest states them.

    Args:
        checkpoint: its files.
        modules: see `find_parts`.
        mask_token_id: of the model's entry.
        shifted_logits: of the model's entry.
        device_map: likewise.

    Raises:
        AtlasError: it is not a whole model of numbers, causal or masked-diffusion, whose FFNs can be found,
            or its tokenizer does not give texts back.
    """
    from sparsity_atlas.models import working_sizes
    from sparsity_atlas.models.causality import describe_kind
    from sparsity_atlas.models.counting import count
    from sparsity_atlas.models.parameters import count_parameters
    from sparsity_atlas.sites.experts.mixture import met
    from sparsity_atlas.sites.find import describe_parts
    from sparsity_atlas.sites.part import measure

    config = checkpoint.config()
    named = config.get("architectures")
    # A probe on meta weights would prove nothing: the real ones are loaded, once, on the CPU.
    model = load(checkpoint, dtype="auto", device="auto", device_map=device_map)
    kind, parts = _prove(checkpoint, model, modules, mask_token_id)
    tokenizer = _describe_tokenizer(checkpoint, model)
    layout = layout_of(config)
    own = named[0] if isinstance(named, list) and named and layout is None else None
    if shifted_logits is None:
        shifted_logits = layout is not None and layout.shifted
    return {
        "architecture": own or type(model).__name__,
        "model_type": config.get("model_type") or model.config.model_type,
        **describe_kind(model, kind, mask_token_id, shifted_logits),
        "dtype": checkpoint.dtype(),
        "parameters": count_parameters(model, parts),
        "memory": {
            **working_sizes.describe(model),
            **({"routed": met(parts)} if met(parts) else {}),
        },
        "counted": count(model),
        "tokenizer": tokenizer,
        **measure(parts),
        **Available.in_parts(parts).describe(),
        "activation": _activation(model, parts),
        "ffn": describe_parts(parts),
    }


def _prove(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    modules: dict[str, str] | None,
    mask_token_id: int | None,
) -> tuple[str, list[Part]]:
    """What kind of model it is, and its parts."""
    from sparsity_atlas.loading.wholeness import not_finite
    from sparsity_atlas.models.causality import kind_of
    from sparsity_atlas.sites.find import find_parts, sees_earlier_only

    spoilt = not_finite(model)
    try:
        kind = kind_of(model, mask_token_id)
    except NumericalFailure:
        # With such weights every score is NaN, which is a result of each node.
        if spoilt is None:
            raise
        kind = CAUSAL if sees_earlier_only(model.config.get_text_config()) else DIFFUSION
    try:
        parts = find_parts(model, modules)
    except AtlasError:
        if spoilt is None:
            raise
        raise AtlasError(f"{checkpoint}: {spoilt}") from None
    if spoilt:
        cli.logger.warning("%s: %s", checkpoint, spoilt)
    return kind, parts


def _describe_tokenizer(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
    from sparsity_atlas.models.bos import begins_with_bos
    from sparsity_atlas.models.tokenizer_check import check_tokenizer, embedding_rows

    tokenizer = load_tokenizer(checkpoint)
    # First: one that fails does so here, in one line.
    changes = check_tokenizer(tokenizer, checkpoint.words, embedding_rows(model))
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "begins_with_bos": begins_with_bos(tokenizer, None),
        "changes": changes,
    }


def _activation(model: PreTrainedModel, parts: list[Part]) -> str:
    """What the first nonlinearity is called: silu, relu2, ..."""
    from sparsity_atlas.sites.activation import name_of

    activation = next((part.activation for part in parts if part.activation is not None), None)
    if activation is None:
        return "the class's own"  # within the gate of its experts
    if activation.path is None:
        return activation.name.lower()
    return name_of(model.get_submodule(activation.path))


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas models", description=__doc__)
    parser.add_argument("--name", required=True, help="name of the model in the configuration")
    parser.add_argument(
        "--source", required=True, type=json.loads, help="JSON: path, or hub and revision"
    )
    parser.add_argument("--sites", default="", help="comma-separated sites that the run asks for")
    parser.add_argument(
        "--not-in-experts",
        default=[],
        type=json.loads,
        help="JSON: what the run asks for in vain if the model has routed experts, a line each",
    )
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    arguments = parser.parse_args()

    source = dict(arguments.source)
    modules = source.pop("modules", None)
    checkpoint, revision = resolve(source)
    checkpoint.config()
    given = {key: source.get(key) for key in ("mask_token_id", "shifted_logits", "device_map")}
    description = describe(checkpoint, modules, **given)
    available = Available.in_manifest(description)
    available.check_all(arguments.name, filter(None, arguments.sites.split(",")))
    if arguments.not_in_experts and any(one.get("part") == EXPERTS for one in description["ffn"]):
        raise AtlasError(f"models.{arguments.name}: {arguments.not_in_experts[0]}")
    write_manifest(
        arguments.output,
        {
            "name": arguments.name,
            "source": source,
            "revision": revision,
            "digest": checkpoint.digest(),
            **code_record(checkpoint, revision),
            **_adapter_record(checkpoint),
            **_gguf_record(checkpoint),
            **_quantised_record(checkpoint),
            **description,
        },
    )
    cli.logger.info(
        "%s: %s, %s, %d layers, %s parameters, sites %s",
        arguments.name,
        description["architecture"],
        description["kind"],
        description["layers"],
        _parameters(description["parameters"]),
        ", ".join(description["sites"]),
    )
    if checkpoint.adapter is not None:
        cli.logger.info("%s: merged with the adapter %s", arguments.name, checkpoint.adapter)
    for change in description["tokenizer"]["changes"]:
        cli.logger.info("%s: its tokenizer changes texts: %s", arguments.name, change)


def _parameters(counts: dict[str, int]) -> str:
    total = f"{counts['total']:,}"
    return f"{total} ({counts['active']:,} active)" if "active" in counts else total


def _adapter_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of an adapter that is merged into the model; nothing without one."""
    if checkpoint.adapter is None:
        return {}
    found = describe_adapter(checkpoint.adapter)
    return {"adapter": {**found, "revision": checkpoint.adapter_revision}}


def _gguf_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of the GGUF file that holds the model; nothing of other formats."""
    if checkpoint.gguf is None:
        return {}
    return {"gguf": describe_gguf(checkpoint.folder / checkpoint.gguf)}


def _quantised_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of a quantised checkpoint: how it is, and whether it runs packed."""
    method = method_of(checkpoint.config())
    if method is None:
        return {}
    return {"dequantised" if checkpoint.dequantise else "quantised": method}


def code_record(checkpoint: Checkpoint, revision: str | None) -> dict[str, Any]:
    """What a manifest says of a model's own code; nothing unless it is trusted."""
    if not checkpoint.trust_remote_code:
        return {}
    repository = checkpoint.code_repository()
    return {
        "code": {
            "repository": repository,
            "revision": checkpoint.code_revision or revision,
            "files": {
                path.relative_to(checkpoint.folder).as_posix(): file_digest(path)
                for path in checkpoint.code_files()
            },
        }
    }
