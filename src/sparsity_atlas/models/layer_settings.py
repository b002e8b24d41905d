"""Settings of a configuration that may differ from layer to layer.

Gemma 4 has wider heads where it sees everything, and models that were pruned or searched for state
`per_layer_config`: of these transformers refuses to say one value for all. Others state a list.
"""

from __future__ import annotations

from typing import Any


def in_layers(config: Any, name: str) -> list[Any]:
    """A setting's value in each layer of a decoder; None where it has none.

    Args:
        config: of the decoder alone.
        name: of the setting.
    """
    count = getattr(config, "num_hidden_layers", None) or 0
    if getattr(config, "is_heterogeneous", False):
        return [getattr(one, name, None) for one in config.per_layer_config]
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        return list(value) if len(value) == count else [None] * count
    return [value] * count


def in_all_layers(config: Any, name: str) -> Any:
    """The value of a setting that all layers have; None where they differ, or have none."""
    first, *others = in_layers(config, name) or [getattr(config, name, None)]
    return first if all(one == first for one in others) else None
