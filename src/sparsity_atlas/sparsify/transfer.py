"""Numbers to a device and back, without waiting for what it has in hand.

A plain copy to or from a GPU waits until the GPU has done all that it was given. From pinned memory, and into
it, a copy takes its turn on the GPU like any other work, so that the host can go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of an array on a device; on the CPU the array itself."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors of one device to the host.

    Args:
        tensors: one at least.

    Returns:
        What waits for the copies, and gives them.
    """
    if tensors[0].device.type != "cuda":
        return lambda: [one.cpu().numpy() for one in tensors]
    copies = [
        torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True)
        for one in tensors
    ]
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[np.ndarray]:
        done.synchronize()
        return [one.numpy() for one in copies]

    return wait


def stacked(counted: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """What the slots counted in one pass, which ran through all of them, on one device.

    Args:
        counted: of one shape each, on the devices of the layers that they are of.
        device: where they are wanted; from each other one they come in one piece.
    """
    found = [one for one in counted if one is not None]
    assert len(found) == len(counted), "a pass runs through all slots"
    for other in {one.device for one in found} - {device}:
        places = [place for place, one in enumerate(found) if one.device == other]
        moved = torch.stack([found[place] for place in places]).to(device)
        for place, one in zip(places, moved, strict=True):
            found[place] = one
    return torch.stack(found)
