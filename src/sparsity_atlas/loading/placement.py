"""A model over several devices (`device_map: auto`): on the GPUs, and what does not fit there in host memory.

Where what goes is accelerate's own choice: whole layers, spread evenly. It moves what a layer is given to
the layer's device, so that the model is called like any other; what is counted at a layer stays on that
layer's device until it is added up.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.free_memory import GIB, free
from sparsity_atlas.sites.offloading import META

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

Limits = dict[int | str, int]


def spread(
    model: PreTrainedModel,
    devices: Sequence[torch.device],
    *,
    limits: Limits | None = None,
    folder: str | None = None,
) -> PreTrainedModel:
    """Spread a model over devices.

    Args:
        model: in host memory.
        devices: those that it may use, the first one first; a single one that is no GPU gets it whole.
        limits: bytes of weights that each may hold, by number or as `cpu` and `disk`; None: what is free.
        folder: for weights that fit nowhere else, if they may go to a disk.

    Returns:
        The model itself.

    Raises:
        AtlasError: it does not fit, or its first weights do not fit on a device.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kept = sorted(getattr(model, "_no_split_modules", None) or ())
    if limits is None and devices[0].type != "cuda":
        whole: Any = model.to
        whole(devices[0])
        return model
    options = {"no_split_module_classes": kept, "dtype": model.dtype}
    model.tie_weights()
    room = limits or get_balanced_memory(model, **options)
    if limits is None:
        # What lies there already counts as taken, and is this model.
        room["cpu"] = room.get("cpu", 0) + sum(one.nbytes for one in model.parameters())
    placed: dict[str, Any] = infer_auto_device_map(model, max_memory=dict(room), **options)
    if folder is None and "disk" in placed.values():
        held = {key: f"{value / GIB:.1f} GiB" for key, value in room.items()}
        raise AtlasError(
            f"device_map: auto: {type(model).__name__} fits into neither the GPUs nor the memory that is "
            f"left beside it ({held})"
        )
    cli.logger.info("%s: %s", type(model).__name__, in_words(model, placed))
    dispatch_model(
        model,
        placed,
        # By number or name, as accelerate compares it.
        main_device=devices[0].index if devices[0].type == "cuda" else devices[0].type,
        offload_dir=folder,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )
    if model.device.type == META:
        raise AtlasError(
            f"device_map: auto: the embedding of {type(model).__name__} does not fit on {devices[0]}"
        )
    return model


def in_words(model: PreTrainedModel, placed: Mapping[str, Any]) -> str:
    """How much of a model lies where.

    Args:
        model: with its weights.
        placed: device by the name of a module, as accelerate gives it.
    """
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        steps = name.split(".")
        # The longest name that leads to it; the model as a whole is the empty one.
        module = next(
            ".".join(steps[:count])
            for count in range(len(steps), -1, -1)
            if ".".join(steps[:count]) in placed
        )
        device = placed[module]
        sizes[f"cuda:{device}" if isinstance(device, int) else str(device)] += parameter.nbytes
    return ", ".join(f"{size / GIB:.2f} GiB on {place}" for place, size in sizes.items())


def tightest(model: PreTrainedModel) -> torch.device:
    """Of the devices that run a model, the one with the least memory left."""
    import torch

    placed = getattr(model, "hf_device_map", None) or {}
    gpus = {torch.device("cuda", one) for one in placed.values() if isinstance(one, int)}
    return min(gpus, key=lambda one: free(one)[0]) if len(gpus) > 1 else model.device
