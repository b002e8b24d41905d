"""The parts of a model as its manifest describes them: written, and bound to modules again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import Activation, activation_function
from sparsity_atlas.sites.attention import Attention
from sparsity_atlas.sites.experts.mixture import bind_experts
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.part import Part, by_layer
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.sites.shaping import Shaping
from sparsity_atlas.terms import ATTENTION, EXPERTS
from sparsity_atlas.terms import FFN as DENSE


def describe_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What `bind_parts` needs to find the parts again, as JSON: a layer's FFN, its attention within.

    A layer that is an attention alone is an entry that says so (`part`); a layer without a part is none.

    Args:
        parts: of one model, layer by layer.
    """
    described = []
    for own in by_layer(parts).values():
        attention = next((part.describe() for part in own if part.name == ATTENTION), None)
        alone = {"layer": own[0].layer, "part": ATTENTION}
        beside = [part.describe() for part in own if part.name != ATTENTION] or [alone]
        described += [{**beside[0], "attention": attention}, *beside[1:]]
    return described


def bind_parts(model: nn.Module, descriptions: list[dict[str, Any]]) -> list[Part]:
    """Bind described parts to a model's modules, without a probe.

    Args:
        model: the model that `find_parts` looked at, perhaps loaded again.
        descriptions: of `describe_parts`, as stored in model.json.

    Returns:
        Layer by layer, in the order of a forward pass.

    Raises:
        AtlasError: the model has no module of that name.
    """
    parts: list[Part] = []
    for entry in descriptions:
        # A manifest of an earlier release has none.
        attention = entry.get("attention")
        if attention is not None:
            parts.append(_bind_attention(model, entry["layer"], attention))
        if entry.get("part") == EXPERTS:
            _find(model, entry["path"])
            parts.append(bind_experts(entry, model))
        elif entry.get("part") != ATTENTION:
            parts.append(_bind_ffn(model, entry))
    return parts


def _bind_attention(model: nn.Module, layer: int, entry: dict[str, Any]) -> Attention:
    return Attention(
        layer=layer,
        qkv=tuple(Projection(path, _find(model, path)) for path in entry["qkv"]),
        o=Projection(entry["o"], _find(model, entry["o"])),
        hidden=entry["hidden"],
        width=entry["width"],
        made=entry["outputs"],
        hidden_out=entry["hidden_out"],
        model=model,
    )


def _bind_ffn(model: nn.Module, entry: dict[str, Any]) -> FFN:
    def projection(place: dict[str, Any]) -> Projection:
        return Projection(place["module"], _find(model, place["module"]), place["half"])

    return FFN(
        layer=entry["layer"],
        hidden=entry["hidden"],
        width=entry["width"],
        up=projection(entry["up"]),
        gate=projection(entry["gate"]) if entry["gate"] is not None else None,
        activation=_activation(model, entry["activation"]),
        down=projection(entry["down"]),
        model=model,
        overwritten=entry["overwritten"],
        name=entry.get("part", DENSE),
        shaping=Shaping(**entry.get("shaping", {})),
        norm=Projection(entry["norm"], _find(model, entry["norm"])) if "norm" in entry else None,
    )


def _activation(model: nn.Module, entry: dict[str, Any]) -> Activation:
    before = Shaping(**entry.get("before", {}))
    if entry["module"] is None:
        return Activation(entry["name"], activation_function(entry["name"]), before=before)
    module = _find(model, entry["module"])
    own = None if entry["shared"] else module
    return Activation(entry["name"], module.forward, entry["module"], own, before)


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise AtlasError(
            f"model.json: ffn: {path}: {type(model).__name__} has no such module; "
            "delete model.json to have the model described again"
        ) from error
