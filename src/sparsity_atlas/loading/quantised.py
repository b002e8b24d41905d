"""Quantised checkpoints: turned into plain numbers where they are asked for so, and never run packed.

What a rule reads of weights, and what is counted of them, holds for matrices of numbers alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "quantization_config"


@dataclass(frozen=True)
class Method:
    """A way to quantise that transformers can undo.

    Attributes:
        growth: how many times the file 16 bits take, about.
        package: what transformers needs for it besides.
        switch: whether it is undone while the weights are read; else afterwards.
    """

    growth: int
    package: str | None = None
    switch: bool = True


# By `quant_method` in config.json.
METHODS = {
    "fp8": Method(2),
    "mxfp8": Method(2),
    "mxfp4": Method(4),
    "compressed-tensors": Method(4, "compressed-tensors"),
    "bitsandbytes": Method(4, "bitsandbytes", switch=False),
}


def method_of(config: dict[str, Any]) -> str | None:
    """How the checkpoint of a configuration is quantised; None if it is not."""
    for part in _parts(config):
        found = part.get(KEY)
        if found is not None:
            name = found.get("quant_method") if isinstance(found, dict) else None
            return name or "unknown method"
    return None


def check_quantised(where: str, config: dict[str, Any], dequantise: bool) -> None:
    """Refuse a quantised checkpoint that is not to be dequantised, or cannot be.

    Args:
        where: its folder, for errors.
        config: content of its config.json.
        dequantise: of the model's entry.

    Raises:
        AtlasError: says what is missing.
    """
    name = method_of(config)
    if name is None:
        if dequantise:
            raise AtlasError(
                f"{where}: dequantise: true, but its config.json names no quantisation"
            )
        return
    what = f"{where}: a quantised checkpoint ({name})"
    method = METHODS.get(name)
    if method is None:
        known = ", ".join(METHODS)
        raise AtlasError(
            f"{what}: only what transformers turns into plain numbers can be used ({known}); take the "
            "model's unquantised weights"
        )
    if not dequantise:
        raise AtlasError(
            f"{what}: say dequantise: true in the model's entry, which has it computed in plain numbers"
        )
    if method.package is not None and not _installed(method.package):
        raise AtlasError(
            f"{what}: needs the package {method.package}: pip install {method.package}"
        )


def as_numbers(config: PretrainedConfig) -> None:
    """Have transformers undo the quantisation while it reads weights, where it can then."""
    for part in (config, config.get_text_config()):
        found = getattr(part, KEY, None)
        if isinstance(found, dict) and METHODS[found["quant_method"]].switch:
            setattr(part, KEY, {**found, "dequantize": True})


def in_numbers(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model in plain numbers.

    Args:
        model: as it was loaded.
        dtype: that it is to have; `auto`: as it comes.

    Raises:
        AtlasError: some of it is still packed.
    """
    import torch

    undo: Any = getattr(model, "dequantize", None)
    if getattr(model, "is_quantized", False) and undo is not None:
        undo()
    for name, value in model.named_parameters():
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise AtlasError(
                f"{type(model).__name__}: {name} is still {value.dtype} once it is dequantised"
            )
    if dtype != "auto":
        move: Any = model.to
        move(getattr(torch, dtype))
    return model


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    yield from (one for one in config.values() if isinstance(one, dict))
