"""Captured tensors from which a part computes its output, read as it takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsity_atlas.activations.layout import group_name
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.terms import ROUTING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sparsity_atlas.sites.part import Part


def source_names(part: Part, site: str) -> list[str]:
    """Names, in the store, of what `Part.sources` names."""
    return [group_name(part.name, tensor) for tensor in part.sources(site)]


def reader(
    store: ActivationStore, part: Part, site: str
) -> Callable[[slice], dict[str, np.ndarray]]:
    """Reads some tokens of what `Part.sources` names, by tensor: [tokens, width] each."""
    rows = {
        tensor: store.rows(group_name(part.name, tensor), part.layer)
        for tensor in part.sources(site)
    }
    return lambda tokens: {tensor: one[tokens] for tensor, one in rows.items()}


def given(read: dict[str, np.ndarray], part: Part) -> dict[str, Tensor]:
    """What a `reader` read as `Part.run` takes it: activations in the model's type, on its device."""
    import torch

    like = part.readers("intermediate")[0].like(part.model)
    found = {tensor: torch.from_numpy(values).to(like.device) for tensor, values in read.items()}
    return {
        tensor: values if tensor in ROUTING else values.to(like.dtype)
        for tensor, values in found.items()
    }
