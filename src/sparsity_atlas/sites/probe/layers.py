"""Which of the proved FFNs are the decoder's layers, and what to say if they are not all there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.probe.hypotheses import Findings, Hypothesis
from sparsity_atlas.sites.probe.naming import NamedFFN, tree

# A worse fit than this says nothing about what went wrong.
NEAR = 0.5


def one_a_layer(model: nn.Module, findings: Findings, layers: int | None) -> list[Hypothesis]:
    """The decoder's FFNs, in the order of execution.

    They are those of a list of modules of which every member holds exactly one: a list as long as
    the configuration has layers, else one that holds all FFNs of the model, else, where the configuration
    does not say, the only one. Without such a list, there must be as many as the configuration has layers.

    Args:
        model: the model that was searched.
        findings: what the search proved.
        layers: number of layers in the configuration, if it says.

    Raises:
        AtlasError: fewer or more were found; shows the module tree where one is missing, and how
            to name the modules.
    """
    complete: list[list[Hypothesis]] = []
    for path, members in module_lists(model):
        inside = _by_member(path, findings.proved)
        if len(inside) == len(members) and all(len(found) == 1 for found in inside.values()):
            complete.append([entry for found in inside.values() for entry in found])
    for found in complete:
        if len(found) == layers:
            return found
    for found in complete:
        if len(found) == len(findings.proved):
            return found
    if len(complete) > 1 and layers is None:
        raise AtlasError(
            f"{type(model).__name__}: several lists of layers hold an FFN each, of {len(complete[0])} and "
            f"{len(complete[1])} layers, and its configuration does not say how many its decoder has: models "
            "of several stacks are not supported"
        )
    if complete and layers is None:
        return complete[0]
    if findings.proved and len(findings.proved) == layers:
        return findings.proved
    raise AtlasError(not_found(model, findings, layers))


def as_named(findings: Findings, named: list[NamedFFN]) -> list[Hypothesis]:
    """The FFNs that the user named, in the order of execution.

    Raises:
        AtlasError: a named module that did not run, or is not what it was named as.
    """
    proved = {entry.down.path for entry in findings.proved}
    closest = {entry.down.path: entry for entry in findings.closest}
    for layer, entry in enumerate(named):
        if entry.down in proved:
            continue
        idle = [path for path in entry.paths() if not findings.calls[path]]
        if idle:
            raise AtlasError(f"modules: {idle[0]}: did not run in a forward pass of the model")
        if entry.down not in closest:
            raise AtlasError(
                f"modules: layer {layer}: {', '.join(entry.paths())} do not fit together: found "
                "other widths or inputs than those of an up, gate and down projection"
            )
        best = closest[entry.down]
        raise AtlasError(
            f"modules: layer {layer}: the input of {entry.down} is not {best.formula()}, the best "
            f"fit of what was named: relative error {best.error:.2g}"
        )
    return findings.proved


class SharedFFN(AtlasError):
    """FFNs that are several layers', which no further search makes those of one."""


def check_run_once(findings: Findings) -> None:
    """Refuse FFNs that several layers share.

    Raises:
        SharedFFN: a projection ran more than once in a forward pass.
    """
    for entry in findings.proved:
        for projection in (entry.up, entry.gate, entry.norm, entry.down):
            if projection is not None and findings.calls[projection.path] != 1:
                raise SharedFFN(
                    f"{projection.path}: found {findings.calls[projection.path]} calls in one "
                    "forward pass, expected one: layers that share an FFN are not supported"
                )


def check_own_weights(found: Iterable[Hypothesis]) -> None:
    """Refuse FFNs of several layers that are one: other modules with the same weights (Zamba).

    Raises:
        SharedFFN: names the first two.
    """
    owner: dict[int, str] = {}
    for entry in found:
        place = entry.down.path
        maps = (entry.up, entry.down)
        for parameter in (one for own in maps for one in own.module.parameters()):
            first = owner.setdefault(id(parameter), place)
            if first != place:
                raise SharedFFN(
                    f"{first} and {place} are the same weights: layers that share an FFN are not supported"
                )


def module_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """All lists of modules, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            yield path, module


def _by_member(path: str, proved: list[Hypothesis]) -> dict[str, list[Hypothesis]]:
    inside: dict[str, list[Hypothesis]] = defaultdict(list)
    for entry in proved:
        if entry.down.path.startswith(f"{path}."):
            inside[entry.down.path.removeprefix(f"{path}.").partition(".")[0]].append(entry)
    return inside


def _without_ffn(
    path: str, members: nn.ModuleList, inside: dict[str, list[Hypothesis]]
) -> str | None:
    """Why layers have no FFN of their own to be named, if that can be seen of them."""
    owner: dict[int, int] = {}
    for layer, member in enumerate(members):
        for name, parameter in member.named_parameters():
            first = owner.setdefault(id(parameter), layer)
            if first != layer:
                return (
                    f"{path}.{first} and {path}.{layer} share {name}: layers that share their weights "
                    "are not supported"
                )
    if not inside and all(mixes_by_convolution(member, "", ()) for member in members):
        return "a state-space model: its layers have no FFN, whose activations could be sparse"
    return None


def mixes_by_convolution(layer: nn.Module, path: str, own: Iterable[str]) -> bool:
    """Whether a layer's matrices beside its parts are all within one mixer with a convolution over tokens.

    Such is a state-space model's, or a short convolution: no attention, and no FFN.

    Args:
        layer: its module.
        path: of that module.
        own: paths of its parts' modules; none of a layer that has no other part.
    """
    held = [one.removeprefix(f"{path}.") for one in own]
    children = [
        child
        for name, child in layer.named_children()
        if not any(one == name or one.startswith(f"{name}.") for one in held)
        if any(parameter.dim() == 2 for parameter in child.parameters())
    ]
    return len(children) == 1 and any(
        isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
        for module in children[0].modules()
    )


def not_found(model: nn.Module, findings: Findings, layers: int | None) -> str:
    """What to say where layers are left whose FFN no probe proves."""
    lists = [entry for entry in module_lists(model) if layers in (None, len(entry[1]))]
    shown: nn.Module = model
    place, template = "the model", "<layers>.{layer}"
    if lists:
        # The decoder's own list is the one with the most parameters in it.
        path, members = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
        inside = _by_member(path, findings.proved)
        reason = _without_ffn(path, members, inside)
        if reason is not None:
            return f"{type(model).__name__}: {reason}"
        odd = [index for index in range(len(members)) if len(inside.get(str(index), [])) != 1]
        index = odd[0] if odd else 0
        shown, place, template = members[index], f"{path}.{index}", f"{path}.{{layer}}"
    # Square maps are rather attention's.
    near = [e for e in findings.closest if e.error < NEAR and e.width > e.hidden]
    near = [entry for entry in near if not lists or entry.down.path.startswith(f"{place}.")]
    hint = "".join(
        f"what {one.down.path} makes is not added to the layer's output; "
        for one in findings.elsewhere
        if one.down.path.startswith(f"{place}.")
    )
    if near:
        best = min(near, key=lambda entry: (-entry.width, entry.error))
        hint += (
            f"closest: input of {best.down.path} against {best.formula()}, relative error "
            f"{best.error:.2g}; "
        )
    return (
        f"{type(model).__name__}: found {len(findings.proved)} FFNs that a probe proves, expected "
        f"one in each of {layers or 'its'} layers; {place} is {tree(shown)}; {hint}"
        "if it has an FFN, name its modules in the config: "
        f'modules: {{up: "{template}.<up>", gate: "{template}.<gate>", down: "{template}.<down>", '
        "activation: silu} (no gate if it has none; gate_up, with order: gate_up or up_gate, for "
        "one module that makes both)"
    )
