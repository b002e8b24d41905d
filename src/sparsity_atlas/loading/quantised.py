"""Quantised checkpoints: run as they are packed, or turned into plain numbers where they are asked for so.

What a rule reads of weights holds for matrices of numbers; of a packed map these are what it makes of the
unit vectors (`criteria.place.matrix`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "quantization_config"


@dataclass(frozen=True)
class Method:
    """A way to quantise.

    Attributes:
        growth: how many times the file 16 bits take, about.
        packages: what transformers needs for it besides.
        undone: when transformers can undo it: while the weights are read (`reading`), `afterwards`, or never.
        packed: whether maps can run packed: else only in plain numbers.
        unpacks: whether each map that does is unpacked when it first runs, and stays so.
    """

    growth: int
    packages: tuple[str, ...] = ()
    undone: str | None = "reading"
    packed: bool = True
    unpacks: bool = False


# Tensors by which a packed map rounds what it reads or gives: plain numbers have no use for them.
_ROUNDS = re.compile(r"\.(?:input|output|activation|k|v)_(?:global_scale|scale|zero_point)$")

# By `quant_method` in config.json.
METHODS = {
    # Their kernels replace experts, too, and want a GPU.
    "fp8": Method(2, packed=False),
    "mxfp8": Method(2, packed=False),
    "mxfp4": Method(4, packed=False),
    "compressed-tensors": Method(4, ("compressed-tensors",), unpacks=True),
    "bitsandbytes": Method(4, ("bitsandbytes",), undone="afterwards"),
    "gptq": Method(4, ("optimum", "gptqmodel"), undone=None),
    "awq": Method(4, ("gptqmodel",), undone=None),
}


def method_of(config: dict[str, Any]) -> str | None:
    """How the checkpoint of a configuration is quantised; None if it is not."""
    for part in _parts(config):
        found = part.get(KEY)
        if found is not None:
            found = found if isinstance(found, dict) else {}
            # As transformers reads what bitsandbytes' first releases saved.
            old = "bitsandbytes" if found.get("load_in_8bit") or found.get("load_in_4bit") else None
            return found.get("quant_method") or old or "unknown method"
    return None


def check_quantised(where: str, config: dict[str, Any], dequantise: bool) -> None:
    """Refuse a quantised checkpoint that cannot run packed, or not be dequantised where it is to be.

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
        raise AtlasError(
            f"{what}: not supported; known: {', '.join(METHODS)}; take the model's unquantised weights"
        )
    if not dequantise and not method.packed:
        raise AtlasError(
            f"{what}: say dequantise: true in the model's entry, which has it computed in plain numbers"
        )
    if dequantise and method.undone is None:
        raise AtlasError(
            f"{what}: transformers does not turn it into plain numbers; without dequantise: true it runs "
            "packed"
        )
    for package in method.packages:
        if not _installed(package):
            raise AtlasError(f"{what}: needs the package {package}: pip install {package}")


def where_packed(
    where: str, target: torch.device, *, whole: bool
) -> dict[str, dict[str, torch.device]]:
    """What has transformers put packed weights on a device.

    Its kernels choose how weights lie in memory where they are read, and some cannot be moved later.

    Raises:
        AtlasError: they are to be spread.
    """
    if not whole:
        raise AtlasError(
            f"{where}: device_map: a quantised checkpoint that runs packed is on one device; with "
            "dequantise: true it can be spread"
        )
    return {"device_map": {"": target}}


@contextmanager
def as_numbers(config: PretrainedConfig) -> Iterator[None]:
    """Have transformers undo the quantisation while it reads weights, where it can then.

    A map's scales it spreads over the map evenly: where the last block of a row or column is a part of one,
    as in DeepSeek-V3's latent attention, it would multiply by a neighbour's scale, or give up. Here such a
    map of FP8 is filled up to whole blocks meanwhile.

    Args:
        config: of the checkpoint; it is changed.
    """
    from torch.nn import functional
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    block = None
    for part in (config, config.get_text_config()):
        found = getattr(part, KEY, None)
        if isinstance(found, dict) and METHODS[found["quant_method"]].undone == "reading":
            setattr(part, KEY, {**found, "dequantize": True})
            block = found.get("weight_block_size") or block
    undo: Callable[..., Tensor] = Fp8Dequantize._dequantize_one

    def in_blocks(
        self: Fp8Dequantize, packed: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        if block is None or not packed.is_floating_point() or scales.dim() < len(block):
            return undo(self, packed, scales, output_dtype)
        rows, columns = packed.shape[-2:]
        below, beside = (-size % step for size, step in zip((rows, columns), block, strict=True))
        grid = ((rows + below) // block[0], (columns + beside) // block[1])
        if not (below or beside) or tuple(scales.shape[-2:]) != grid:
            return undo(self, packed, scales, output_dtype)
        filled = functional.pad(packed.float(), (0, beside, 0, below))
        return undo(self, filled, scales, output_dtype)[..., :rows, :columns].contiguous()

    with mock.patch.object(Fp8Dequantize, "_dequantize_one", in_blocks):
        yield


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


def unpack(model: PreTrainedModel, method: str) -> None:
    """Unpack maps that a hook on the model unpacks when it first runs: stages also run it past its hooks.

    Args:
        model: as it was loaded.
        method: how its checkpoint is quantised.
    """
    import torch

    if METHODS[method].unpacks:
        with torch.no_grad():
            model(torch.zeros((1, 2), dtype=torch.int64, device=model.device))


def rounding(names: Iterable[str]) -> set[str]:
    """Those of some tensors of a checkpoint that round what a packed map reads or gives."""
    return {name for name in names if _ROUNDS.search(name)}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    yield from (one for one in config.values() if isinstance(one, dict))
