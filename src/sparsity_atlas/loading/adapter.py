"""Adapters as PEFT saves them: which files they are, and how one is merged into its model.

transformers applies an adapter that lies in a model's folder by itself. Here one is applied only where the
model's entry names it, and then it is part of the digest.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import file_digest, read_json
from sparsity_atlas.loading.contents import check_fetched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
SAFE_ADAPTER, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
# Names of tensors that an error quotes.
_SHOWN = 3
# Ways to begin a training that change the model's own weights, some of them at random.
_CHANGING = ("pissa_niter", "corda", "loftq", "lora_ga")


def adapter_files(folder: Path, *, pickles: bool) -> list[Path]:
    """The files that an adapter is read from: its configuration and its weights.

    Args:
        folder: of the adapter.
        pickles: whether its weights may be a pickle.

    Raises:
        AtlasError: they are not there, or only as a pickle that may not be used.
    """
    config = folder / ADAPTER
    # Unlike Path.is_file, this takes a name that no file can have for that of no file.
    if not os.path.isfile(config):
        raise AtlasError(f"models: adapter: {folder}: expected a PEFT adapter, found no {ADAPTER}")
    for name in (SAFE_ADAPTER, *([PICKLED_ADAPTER] if pickles else [])):
        if (folder / name).is_file():
            check_fetched([config, folder / name])
            return [config, folder / name]
    if (folder / PICKLED_ADAPTER).is_file():
        raise AtlasError(
            f"models: adapter: {folder}: found only {PICKLED_ADAPTER}, a pickle, which runs code when it is "
            "loaded, and is used only if the model's entry says allow_pickle: true"
        )
    raise AtlasError(f"models: adapter: {folder}: expected {SAFE_ADAPTER}, found none")


def adapter_digest(folder: Path, *, pickles: bool) -> dict[str, str]:
    """Digests of an adapter's files, by their names; see `adapter_files`."""
    return {path.name: file_digest(path) for path in adapter_files(folder, pickles=pickles)}


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What a manifest says of an adapter: its kind, and the model that its own configuration names."""
    content = read_json(folder / ADAPTER)
    return {"type": content.get("peft_type"), "made_for": content.get("base_model_name_or_path")}


def merge_adapter(model: PreTrainedModel, folder: Path, *, pickles: bool) -> PreTrainedModel:
    """The model with an adapter's changes in its weights, and no module of PEFT in it.

    Args:
        model: as it was loaded, on the CPU; it is changed.
        folder: of the adapter.
        pickles: whether its weights may be a pickle.

    Raises:
        AtlasError: it cannot be merged, is not all there, or is no adapter of this model.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    where = f"models: adapter: {folder}"
    content = _read(adapter_files(folder, pickles=pickles)[0])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(content["peft_type"])
    if kind is None:
        raise AtlasError(f"{where}: peft_type: unknown '{content['peft_type']}'")
    known = inspect.signature(kind).parameters
    for key, value in content.items():
        # PEFT passes over what it does not know.
        if value and key not in known and key not in ("peft_version", "auto_mapping"):
            raise AtlasError(f"{where}: {ADAPTER}: {key}: unknown to the installed peft")
    began = content.get("init_lora_weights")
    if isinstance(began, str) and began.startswith(_CHANGING):
        raise AtlasError(
            f"{where}: {ADAPTER}: init_lora_weights: '{began}' changes the model's own weights, which is not "
            "done here; convert the adapter to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise AtlasError(f"{where}: {content['peft_type']} cannot be merged into a model's weights")
    config.inference_mode = True
    with torch.no_grad():
        wrapped = PeftModel(model, config)
        report = wrapped.load_adapter(
            str(folder),
            wrapped.active_adapter,
            torch_device="cpu",
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
        )
        for keys, fault in (
            (report.missing_keys, "are missing"),
            (report.unexpected_keys, "are not the model's"),
        ):
            if keys:
                named = ", ".join(sorted(keys)[:_SHOWN])
                raise AtlasError(f"{where}: {len(keys)} of its tensors {fault} ({named})")
        _untie(model)
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    left = [name for name, one in merged.named_modules() if type(one).__module__.startswith("peft")]
    if left:
        raise AtlasError(f"{where}: {content['peft_type']} cannot be merged into {left[0]}")
    return merged


def _untie(model: PreTrainedModel) -> None:
    """Give modules weights of their own that they share with one that an adapter changes.

    Of a tied embedding and head, PEFT has each changed by what the adapter names it for, if it does. Merged
    into the weight that they share, one's change would reach the other, or come twice.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
    adapted = [one.get_base_layer() for one in layers]
    inside = {part for one in layers for part in one.modules()}
    changed = {id(weight) for one in adapted for weight in one.parameters(recurse=False)}
    taken: set[int] = set()
    for module in (*dict.fromkeys(adapted), *(set(model.modules()) - inside)):
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in taken:
                setattr(module, name, nn.Parameter(weight.clone(), requires_grad=False))
                for config in (model.config, model.config.get_text_config()):
                    config.tie_word_embeddings = False
            elif id(weight) in changed:
                taken.add(id(weight))


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise AtlasError(f"{path}: expected a JSON object with 'peft_type'")
    return content
