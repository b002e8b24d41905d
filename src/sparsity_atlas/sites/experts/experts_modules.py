"""The modules of a model that hold routed experts and can be served."""

from __future__ import annotations

from torch import nn

from sparsity_atlas.sites.experts.scaled_inputs import ScaledInputs, has_scaled_inputs

# What the decorator of transformers' experts interface sets.
_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")


def interfaced(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that go through the experts interface, by path."""
    return {path: one for path, one in model.named_modules() if _marked(one)}


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts, by path, each with what the interface's modules have."""
    return {
        path: served(module)
        for path, module in model.named_modules()
        if _marked(module) or has_scaled_inputs(module)
    }


def served(module: nn.Module) -> nn.Module:
    """A module of experts, with what the interface's modules have."""
    return module if _marked(module) else ScaledInputs(module)


def _marked(module: nn.Module) -> bool:
    return all(hasattr(module, mark) for mark in _MARKS)
