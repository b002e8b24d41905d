"""The decoder's layers: which FFN and which experts each of them holds, and which hold neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.probe.hypotheses import Findings, Hypothesis
from sparsity_atlas.sites.probe.layers import (
    NEAR,
    mixes_by_convolution,
    module_lists,
    one_a_layer,
)
from sparsity_atlas.terms import FFN, SHARED


@dataclass(frozen=True)
class MixedLayer:
    """What one layer holds beside its attention: at most one FFN and at most one module of experts.

    Attributes:
        number: of the layer, as the decoder counts.
        path: of its module; empty where nobody asked.
        ffn: as the search proved it.
        experts: path of the module.
    """

    number: int
    path: str
    ffn: Hypothesis | None
    experts: str | None = None

    @property
    def name(self) -> str:
        """Which part the FFN is: a shared expert where there are experts that not every token goes to."""
        return FFN if self.experts is None else SHARED


def dense_layers(model: nn.Module, findings: Findings, layers: int | None) -> list[MixedLayer]:
    """The layers of a decoder without experts, in the order of execution.

    Each has an FFN; or else some list of as many modules as there are layers holds all FFNs, at most one
    each. Whether those that hold none are right to is for `unexplained` to say.

    Raises:
        AtlasError: see `one_a_layer`.
    """
    try:
        found = one_a_layer(model, findings, layers)
    except AtlasError:
        partly = _members(model, findings, (), layers) if findings.proved else None
        if not isinstance(partly, list):
            raise
        return partly
    return [MixedLayer(number, "", one) for number, one in enumerate(found)]


def mixed_layers(
    model: nn.Module, findings: Findings, experts: Iterable[str], layers: int | None
) -> list[MixedLayer]:
    """The layers of a mixture of experts; see `dense_layers` on those that hold nothing.

    Args:
        model: the model that was searched.
        findings: what the search for FFNs proved.
        experts: paths of the modules of experts.
        layers: number of layers in the configuration, if it says.

    Raises:
        AtlasError: no list of layers of which each holds at most one of both, and all that there are.
    """
    found = _members(model, findings, list(experts), layers)
    if isinstance(found, list):
        return found
    raise AtlasError(f"{type(model).__name__}: {found}")


def _members(
    model: nn.Module, findings: Findings, every: Sequence[str], layers: int | None
) -> list[MixedLayer] | str:
    """The members of the list of modules that holds everything; in words what is wrong if none does."""
    problem = f"no list of modules holds all {len(every)} modules of experts"
    for path, members in module_lists(model):
        if layers not in (None, len(members)):
            continue
        own = [one for one in every if one.startswith(f"{path}.")]
        proved = [one for one in findings.proved if one.down.path.startswith(f"{path}.")]
        if len(own) < len(every) or (not every and len(proved) < len(findings.proved)):
            continue
        found = []
        for number in range(len(members)):
            place = f"{path}.{number}."
            ffns = [one for one in proved if one.down.path.startswith(place)]
            held = [one for one in own if one.startswith(place)]
            if len(ffns) > 1 or len(held) > 1:
                problem = (
                    f"layer {number} ({place[:-1]}) holds {len(ffns)} FFNs that a probe proves and "
                    f"{len(held)} modules of experts; expected at most one of each"
                )
                break
            one = MixedLayer(number, place[:-1], next(iter(ffns), None), next(iter(held), None))
            found.append(one)
        else:
            return found
    return problem


def unexplained(
    model: nn.Module, found: Sequence[MixedLayer], attended: Iterable[int]
) -> MixedLayer | None:
    """The first layer without an FFN and without experts, of which nothing shows that it has none.

    What shows it: all of its maps are those of its attention, or of one state-space mixer.

    Args:
        model: that was searched.
        found: its layers.
        attended: those of which a probe proves that their maps are an attention's.
    """
    proved = set(attended)
    for layer in found:
        if layer.ffn is not None or layer.experts is not None or layer.number in proved:
            continue
        if not mixes_by_convolution(model.get_submodule(layer.path), layer.path, ()):
            return layer
    return None


def check_nothing_beside(model: nn.Module, layer: MixedLayer, findings: Findings) -> None:
    """Refuse a layer of experts alone if there is an FFN beside them that is not proved.

    Raises:
        AtlasError: names it.
    """
    where = type(model).__name__
    place, experts = f"{layer.path}.", layer.experts or ""
    for one in findings.closest:
        # A query map that reads the norm of what the attention before it made is near to some function of it.
        own = one.down.path.startswith(place) and one.up.path.startswith(place)
        if own and one.error < NEAR and one.width > one.hidden:
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
