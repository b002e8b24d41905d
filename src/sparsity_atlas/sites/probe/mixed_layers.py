"""The layers of a mixture of experts: which FFN and which experts each of them holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.probe.hypotheses import Findings, Hypothesis
from sparsity_atlas.sites.probe.layers import NEAR, module_lists
from sparsity_atlas.terms import FFN, SHARED


@dataclass(frozen=True)
class MixedLayer:
    """What one layer holds beside its attention: at most one FFN and at most one module of experts.

    Attributes:
        path: of its module; empty where nobody asked.
        ffn: as the search proved it.
        experts: path of the module.
    """

    path: str
    ffn: Hypothesis | None
    experts: str | None

    @property
    def name(self) -> str:
        """Which part the FFN is: a shared expert where there are experts that not every token goes to."""
        return FFN if self.experts is None else SHARED


def mixed_layers(
    model: nn.Module, findings: Findings, experts: Iterable[str], layers: int | None
) -> list[MixedLayer]:
    """The decoder's layers, each with an FFN, or experts, or both.

    Args:
        model: the model that was searched.
        findings: what the search for FFNs proved.
        experts: paths of the modules of experts.
        layers: number of layers in the configuration, if it says.

    Raises:
        AtlasError: no list of layers of which each holds one or both, and all that there are.
    """
    every = list(experts)
    problem = f"no list of modules holds all {len(every)} modules of experts"
    for path, members in module_lists(model):
        if layers not in (None, len(members)):
            continue
        own = [one for one in every if one.startswith(f"{path}.")]
        if len(own) < len(every):
            continue
        found = []
        for number in range(len(members)):
            place = f"{path}.{number}."
            ffns = [one for one in findings.proved if one.down.path.startswith(place)]
            held = [one for one in own if one.startswith(place)]
            if (not ffns and not held) or len(ffns) > 1 or len(held) > 1:
                problem = (
                    f"layer {number} ({place[:-1]}) holds {len(ffns)} FFNs that a probe proves and "
                    f"{len(held)} modules of experts; expected one of them, or one of each"
                )
                break
            found.append(MixedLayer(place[:-1], next(iter(ffns), None), next(iter(held), None)))
        else:
            return found
    raise AtlasError(f"{type(model).__name__}: {problem}")


def check_nothing_beside(model: nn.Module, layer: MixedLayer, findings: Findings) -> None:
    """Refuse a layer of experts alone if there is an FFN beside them that is not proved.

    Raises:
        AtlasError: names it.
    """
    where = type(model).__name__
    place, experts = f"{layer.path}.", layer.experts or ""
    for one in findings.closest:
        if one.down.path.startswith(place) and one.error < NEAR and one.width > one.hidden:
            raise AtlasError(
                f"{where}: {one.down.path} looks like the down projection of an FFN beside {experts}, and "
                f"its input is not {one.formula()}: relative error {one.error:.2g}"
            )
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        maps = [one for one in module.parameters() if one.dim() > 1 and one.shape[0] > 1]
        if path.startswith(place) and "shared" in last and maps and path != experts:
            raise AtlasError(
                f"{where}: {path} ({type(module).__name__}) seems to be a shared expert, which no probe "
                "proves: such mixtures are not supported"
            )
