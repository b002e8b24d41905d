"""The user's own naming of an FFN's modules, and the module tree shown where the search fails."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsity_atlas.errors import AtlasError

KEYS = ("up", "gate", "gate_up", "order", "down", "activation")
ORDERS = ("gate_up", "up_gate")
TREE_LIMIT = 1200


@dataclass(frozen=True)
class NamedFFN:
    """One layer's modules as the user named them; `up` and `gate`, or the fused `gate_up`."""

    down: str
    up: str | None
    gate: str | None
    gate_up: str | None
    order: str | None
    activation: str | None

    def paths(self) -> list[str]:
        """The linear maps that were named."""
        return [path for path in (self.up, self.gate, self.gate_up, self.down) if path]

    def is_ungated(self, up: str) -> bool:
        """Whether this is an FFN without a gate and with this up projection."""
        return self.up == up and self.gate is None

    def is_gated(self, up: str, gate: str) -> bool:
        """Whether these two modules were named."""
        return self.up == up and self.gate == gate

    def is_fused(self, gate_up: str, gate_half: int) -> bool:
        """Whether this fused module was named, with the gate in this half."""
        return self.gate_up == gate_up and self.order in (None, ORDERS[gate_half])


def expand(model: nn.Module, modules: dict[str, str], layers: int | None) -> list[NamedFFN]:
    """Fill the layer's number into the user's templates.

    Args:
        model: the model whose modules are named.
        modules: the `modules` entry of the model's configuration.
        layers: number of layers; None: as many as the model has modules for.

    Raises:
        AtlasError: unknown or missing keys, or a module that the model does not have.
    """
    for key in modules:
        if key not in KEYS:
            raise AtlasError(f"modules: unknown key '{key}'; known: {', '.join(KEYS)}")
    if "down" not in modules or ("up" in modules) == ("gate_up" in modules):
        raise AtlasError(
            f"modules: found {', '.join(modules) or 'nothing'}; expected `down` and either `up` "
            "(with `gate` if there is one) or `gate_up` (one module for both)"
        )
    if "gate_up" in modules and "gate" in modules:
        raise AtlasError("modules: give `gate` beside `up`, or `gate_up` for one module for both")
    order = modules.get("order")
    if order is not None and (order not in ORDERS or "gate_up" not in modules):
        raise AtlasError(
            f"modules: order: found '{order}'; expected {' or '.join(ORDERS)}, beside `gate_up`"
        )
    paths = dict(model.named_modules(remove_duplicate=False))
    for key in ("up", "gate", "gate_up", "down"):
        if key in modules and "{layer}" not in modules[key] and layers != 1:
            raise AtlasError(
                f"modules: {key}: '{modules[key]}' is one module for all layers; "
                "write {layer} where the layer's number stands"
            )
    if layers is None:
        layers = 0
        while modules["down"].replace("{layer}", str(layers)) in paths:
            layers += 1
    return [_fill(modules, layer, paths) for layer in range(max(layers, 1))]


def _fill(modules: dict[str, str], layer: int, paths: dict[str, nn.Module]) -> NamedFFN:
    filled = {key: value.replace("{layer}", str(layer)) for key, value in modules.items()}
    for key in ("up", "gate", "gate_up", "down"):
        path = filled.get(key)
        if path is not None and path not in paths:
            parent = path
            while parent not in paths:
                parent = parent.rpartition(".")[0]
            raise AtlasError(
                f"modules: {key}: the model has no module '{path}'; "
                f"{parent or 'the model'} is {tree(paths[parent])}"
            )
    return NamedFFN(
        down=filled["down"],
        up=filled.get("up"),
        gate=filled.get("gate"),
        gate_up=filled.get("gate_up"),
        order=filled.get("order"),
        activation=filled.get("activation"),
    )


def tree(module: nn.Module, limit: int = TREE_LIMIT) -> str:
    """A module's tree on one line, as {attention: {...}, ffn: {up: Linear(8→32), ...}}.

    Equal neighbours in a list are drawn once; what exceeds `limit` characters is cut.
    """
    text = _draw(module)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _draw(module: nn.Module) -> str:
    children = dict(module.named_children())
    if not children:
        return f"{type(module).__name__}{_size(module)}"
    drawn: list[tuple[str, str, str]] = []  # first name, last name, drawing
    for name, child in children.items():
        text = _draw(child)
        if drawn and name.isdigit() and drawn[-1][1].isdigit() and drawn[-1][2] == text:
            drawn[-1] = (drawn[-1][0], name, text)
        else:
            drawn.append((name, name, text))
    parts = (
        f"{first if first == last else f'{first}-{last}'}: {text}" for first, last, text in drawn
    )
    return "{" + ", ".join(parts) + "}"


def _size(module: nn.Module) -> str:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return f"({module.in_features}→{module.out_features})"
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return f"({module.nx}→{module.nf})"
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() > 1:
        return f"({'×'.join(map(str, weight.shape))})"
    return ""
