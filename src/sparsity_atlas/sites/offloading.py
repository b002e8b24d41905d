"""Weights of a model that accelerate has spread over devices: where a module computes, and its numbers.

What fits on no GPU lies in host memory. accelerate brings a module's weights to a GPU when it runs and takes
them away again; in between they are without numbers (torch's device `meta`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

META = "meta"


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on, whether its weights are there or are brought there.

    Raises:
        ValueError: it has no weights.
    """
    for one in module.modules():
        parameter = next(one.parameters(recurse=False), None)
        if parameter is None:
            continue
        return _brought_to(one) or parameter.device
    raise ValueError(f"{type(module).__name__} has no weights")


def _brought_to(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    # accelerate joins several hooks of a module to one.
    for one in getattr(hook, "hooks", (hook,)):
        if one is not None and getattr(one, "offload", False):
            return torch.device(one.execution_device)
    return None


def waits(module: nn.Module) -> bool:
    """Whether a module's own weights, not those of what is in it, are brought from elsewhere when it runs."""
    return _brought_to(module) is not None


def offloaded(module: nn.Module) -> bool:
    """Whether some of a module's weights are brought from elsewhere when it runs."""
    return any(waits(one) for one in module.modules())


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights hold their numbers; a tensor that was taken keeps them."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
