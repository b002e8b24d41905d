"""Whether what was loaded is the model, the whole model, and numbers.

transformers draws a weight at random that a checkpoint lacks, anew in each process, and leaves out what it
does not expect; both it only notes in its log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import FLOATING, Checkpoint
from sparsity_atlas.loading.layouts import layout_in
from sparsity_atlas.loading.quantised import rounding
from sparsity_atlas.sites.offloading import offloaded, present

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# How safetensors names those that always need one, whatever the tensor is called.
SHORT = ("F8_", "F6_", "F4")
# Names that an error quotes.
SHOWN = 4
# Ends of names that packed weights have, and who packs them.
PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
# What wrapped a model while it was saved, by the name that the wrapper puts into those of its tensors.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
}


def check_whole(checkpoint: Checkpoint, report: dict[str, Any], config: Any) -> None:
    """Refuse a checkpoint whose tensors are not those of its model.

    Args:
        checkpoint: what was loaded.
        report: transformers' `output_loading_info`, from which is gone what the model ties, and what
            its class ignores.
        config: of the checkpoint, as transformers reads it.

    Raises:
        AtlasError: names the first tensors that are missing, of another shape, or not expected.
    """
    # Of a GGUF file transformers reads some fields, and takes its own defaults for others.
    said = (
        "config.json"
        if checkpoint.gguf is None
        else "the configuration that transformers makes of it"
    )
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"{_count(missing, 'is', 'are')} missing ({_some(missing)})")
    if mismatched:
        shown = (
            f"{name}: {list(found)} in the file, {list(wanted)} by {said}"
            for name, found, wanted in mismatched
        )
        names = [entry[0] for entry in mismatched]
        faults.append(f"{_count(names, 'has', 'have')} another shape ({_some(shown)})")
    if checkpoint.dequantise:
        unexpected -= rounding(unexpected)
    if unexpected and not faults:
        # Older releases saved masks and tables that are computed today.
        unexpected -= _constants(checkpoint, unexpected)
        unexpected -= _of_other_senses(config, unexpected)
    if unexpected:
        faults.append(f"{_count(unexpected, 'is', 'are')} not expected ({_some(unexpected)})")
    if faults:
        raise AtlasError(
            f"{checkpoint}: the weights are not those of the model that {said} describes: "
            + "; ".join(faults)
            + _explanation(missing, unexpected)
        )


def _of_other_senses(config: Any, names: set[str]) -> set[str]:
    """Those that a whole model has for images or sound, where its text part alone was loaded (Llama 4)."""
    import torch
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    known = config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    if not names or not known or config.get_text_config() is config:
        return set()
    with torch.device("meta"):
        whole = AutoModelForMultimodalLM.from_config(config)
    return names & set(whole.state_dict())


def _count(names: Iterable[str], one: str, several: str) -> str:
    count = len(list(names))
    return f"1 tensor {one}" if count == 1 else f"{count} tensors {several}"


def _some(names: Iterable[str]) -> str:
    ordered = list(names) if not isinstance(names, set) else sorted(names)
    more = ", ..." if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _explanation(missing: set[str], unexpected: set[str]) -> str:
    """A part of the names that explains most of what is wrong with them, and where it comes from."""
    for end, method in PACKED.items():
        if any(name.endswith(end) for name in unexpected):
            return (
                f"; '*{end}' is packed, as {method} does it, and config.json has no quantization_config that "
                "says how: take a checkpoint that has one, or the model's unquantised weights"
            )
    found = Counter(
        part
        for name in unexpected
        for part in {
            *(wrapper for wrapper in WRAPPERS if name.replace(wrapper, "") in missing),
            *(name[: dot + 1] for dot in _dots(name) if name[dot + 1 :] in missing),
        }
    )
    lacking = Counter(
        name[: dot + 1] for name in missing for dot in _dots(name) if name[dot + 1 :] in unexpected
    )
    for counted, says in ((found, "have '{}' in"), (lacking, "lack '{}' at the beginning of")):
        if not counted:
            continue
        part, count = counted.most_common(1)[0]
        if 2 * count >= len(unexpected):
            by = f", which {WRAPPERS[part]} puts there" if part in WRAPPERS else ""
            return f"; they {says.format(part)} their names{by}: save the model with its own names"
    return ""


def _dots(name: str) -> list[int]:
    return [place for place, sign in enumerate(name) if sign == "."]


def _constants(checkpoint: Checkpoint, names: set[str]) -> set[str]:
    """Those of some tensors of a checkpoint that no training made."""
    import torch
    from safetensors import safe_open

    found: set[str] = set()
    for path in checkpoint.weight_files():
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            found |= {name for name in names & tensors.keys() if is_constant(tensors[name])}
            continue
        with safe_open(path, framework="pt") as file:
            inside = names & set(file.keys())
            found |= {name for name in inside if is_constant(file.get_tensor(name))}
    return found


def check_types(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse weights that are stored as whole numbers or in 8 bits: without their scales they mean nothing.

    transformers takes them for the numbers that they are where config.json says nothing of quantisation.

    Raises:
        AtlasError: names the first.
    """
    from safetensors import safe_open

    parameters = {name for name, value in model.named_parameters() if value.is_floating_point()}
    layout = layout_in(checkpoint.folder)
    for path in checkpoint.weight_files():
        if path.suffix == ".bin":
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                kind = file.get_slice(name).get_dtype()
                if kind in FLOATING:
                    continue
                own = name if layout is None else layout.rename(name)
                # The names in a file may lack the beginning that the model's have, or have one more; experts
                # may lie there one by one, under names that the model does not have.
                if (
                    name.endswith(".weight")
                    or kind.startswith(SHORT)
                    or any(
                        f".{one}".endswith(f".{own}") or f".{own}".endswith(f".{one}")
                        for one in parameters
                    )
                ):
                    raise AtlasError(
                        f"{checkpoint}: {name} is stored as {kind}; expected F32, BF16 or F16, or a "
                        "quantization_config in config.json that says what it stands for"
                    )


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor is a causal mask, the number that fills one, positions, or rotary frequencies."""
    import torch

    if tensor.numel() < 2:
        return tensor.numel() == 1 and tensor.item() <= -1e4
    size = tensor.shape[-1]
    if tensor.dim() >= 2 and tensor.shape[-2] == size and tensor.numel() == size * size:
        square = tensor.reshape(size, size)
        lower = torch.ones(size, size, dtype=torch.bool).tril()
        below, above = square[lower], square[~lower]
        level = bool((below == below[0]).all() and (above == above[0]).all())
        return level and bool(below[0] != above[0])
    if tensor.numel() != size:
        return False
    row = tensor.flatten().double()
    if torch.equal(row, torch.arange(size, dtype=torch.float64)):
        return True
    # base ** (-2 i / width), in the 16 bits of an old file at worst.
    ratios = row[1:] / row[:-1]
    falling = bool((row > 0).all() and (ratios < 1).all())
    return falling and bool(row[0] == 1) and bool(((ratios / ratios[0] - 1).abs() < 0.02).all())


def _numbers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters with their numbers, also where these wait in host memory."""
    if not offloaded(model):
        yield from ((name, _compared(value)) for name, value in model.named_parameters())
        return
    for path, module in model.named_modules():
        with present(module):
            for name, value in module.named_parameters(path, recurse=False):
                yield name, _compared(value)


def _compared(value: Tensor) -> Tensor:
    """Packed numbers of eight bits and fewer in a type that torch compares, and which has all of them."""
    import torch

    if not value.is_floating_point() or value.itemsize > 1:
        return value
    if "float4" in str(value.dtype):  # which older releases do not have
        return value.view(torch.uint8)  # pairs, none of which is no number
    return value.bfloat16()


def not_finite(model: PreTrainedModel) -> str | None:
    """Which weights are no numbers, in words; None if all are."""
    bad = {name: value for name, value in _numbers(model) if not _finite(value)}
    if not bad:
        return None
    first, value = next(iter(bad.items()))
    kind = "NaN" if value.isnan().any() else "infinite"
    count = int((~value.isfinite()).sum())
    others = f", and {len(bad) - 1} other tensors have such values" if len(bad) > 1 else ""
    return f"{first}: {count:,} of {value.numel():,} values are {kind}{others}"


def _finite(value: Tensor) -> bool:
    """Whether all are numbers: seen at both ends, since masks of a whole vocabulary take its memory again."""
    return not value.numel() or all(bool(end.isfinite()) for end in value.aminmax())


def fill_buffers(model: PreTrainedModel, *, trust_remote_code: bool) -> None:
    """Give buffers that no checkpoint holds the values that a model's own code computes for them.

    transformers makes a model without memory, and buffers with it; afterwards it knows how to compute
    those of its own classes again, and leaves whatever the memory holds in the others.

    Args:
        model: just loaded; its buffers are changed.
        trust_remote_code: whether its code may run, which has run already.
    """
    from accelerate import init_empty_weights

    from sparsity_atlas.loading.layouts import auto_class

    kept = set(model.state_dict())
    own = {name: value for name, value in model.named_buffers() if name not in kept}
    if not own:
        return
    with init_empty_weights(include_buffers=False):
        made = auto_class(model.config).from_config(
            model.config, dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    values = dict(made.named_buffers())
    for name, buffer in own.items():
        if values[name].shape == buffer.shape:
            buffer.copy_(values[name])
