"""What a model can be sparsified at, and what a run may ask of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.by_projection import ONE_MAP, why_together
from sparsity_atlas.sites.part import Part, sites_of
from sparsity_atlas.terms import (
    ATTENTION,
    ATTENTION_TENSORS,
    BESIDE,
    FFN,
    FFN_SITES,
    TENSORS,
    by_projection,
    confined,
    in_every_layer,
    layers_named,
    parts_named,
    plain,
)


@dataclass(frozen=True)
class Available:
    """What a model can be sparsified at.

    Attributes:
        sites: that every layer has.
        of_parts: of each part that some layer has beside attention, those of them that it has.
        layers: of each part, attention among them, the layers that have it; empty where that is not known.
        together: of parts whose maps that read one vector cannot have masks of their own, why.
    """

    sites: tuple[str, ...]
    of_parts: dict[str, tuple[str, ...]]
    layers: dict[str, frozenset[int]] = field(default_factory=dict, compare=False)
    together: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def in_parts(cls, parts: Sequence[Part]) -> Available:
        """Of a model's parts."""
        sites = sites_of(parts)
        of_parts = {}
        for name in dict.fromkeys(part.name for part in parts if part.name != ATTENTION):
            own = [part for part in parts if part.name == name]
            of_parts[name] = tuple(
                site
                for site in sites
                if site in FFN_SITES
                and all(tensor in part.tensors for part in own for tensor in TENSORS[site])
            )
        layers = _layers((part.name, part.layer) for part in parts)
        return cls(sites, of_parts, layers, why_together(map(_described, parts)))

    @classmethod
    def in_manifest(cls, manifest: dict[str, Any]) -> Available:
        """As a model's manifest states it."""
        sites = tuple(manifest["sites"])
        dense = {FFN: [site for site in sites if site in FFN_SITES]}
        of_parts = {name: tuple(own) for name, own in manifest.get("parts", dense).items()}
        described = manifest.get("ffn", ())
        beside = [(one.get("part", FFN), one["layer"]) for one in described]
        attention = [(ATTENTION, one["layer"]) for one in described if one.get("attention")]
        return cls(sites, of_parts, _layers([*beside, *attention]), why_together(described))

    def describe(self) -> dict[str, Any]:
        """As a manifest states it; of a model of dense FFNs alone, its sites say all."""
        stated: dict[str, Any] = {"sites": list(self.sites)}
        if set(self.of_parts) != {FFN}:
            stated["parts"] = {name: list(own) for name, own in self.of_parts.items()}
        return stated

    def names(self, model: str, site: str) -> tuple[str, ...]:
        """All spellings of a site in this model, the plain one first.

        Two where it is confined to all parts that there are, or could be.

        Raises:
            AtlasError: see `check`.
        """
        self.check(model, site)
        every = tuple(name for name in BESIDE if name in self.of_parts)
        if plain(site) not in FFN_SITES or parts_named(site) not in ((), every):
            return (site,)
        layers, each = layers_named(site), by_projection(site)
        both = (confined(plain(site), parts, layers, each=each) for parts in ((), every))
        return tuple(dict.fromkeys(both))

    def check_all(self, model: str, sites: Iterable[str]) -> None:
        """Refuse sites of a run that a model does not have, or of which two are one.

        Args:
            model: its name.
            sites: as paths spell them.

        Raises:
            AtlasError: as `check`; a site that is confined to all parts that there are, beside itself.
        """
        asked = list(sites)
        for site in asked:
            self.check(model, site)
            whole = confined(plain(site), (), layers_named(site), each=by_projection(site))
            if set(parts_named(site)) == set(self.of_parts) and whole in asked:
                raise AtlasError(
                    f"models.{model}: '{site}' is '{whole}' in this model, which has no other part "
                    "beside attention: ask for one of them"
                )

    def check(self, model: str, site: str) -> None:
        """Refuse a site that a model does not have.

        Args:
            model: its name.
            site: as paths spell it.

        Raises:
            AtlasError: names what there is in its place.
        """
        wanted = plain(site)
        if wanted not in self.sites:
            raise AtlasError(
                f"models.{model}: no site '{wanted}' in this model; it has {', '.join(self.sites)}"
            )
        for name in parts_named(site):
            if name not in self.of_parts:
                raise AtlasError(
                    f"models.{model}: '{site}': no part '{name}' in this model; it has "
                    f"{', '.join(self.of_parts)}"
                )
            if wanted not in self.of_parts[name]:
                raise AtlasError(
                    f"models.{model}: '{site}': no site '{wanted}' in its part '{name}', which has "
                    f"{', '.join(self.of_parts[name])}"
                )
        if by_projection(site):
            self._check_maps(model, site)
        self._check_layers(model, site)

    def _check_maps(self, model: str, site: str) -> None:
        """Refuse masks by map where one module makes what several maps would, or one map reads all."""
        for name in self._concerned(plain(site), parts_named(site)):
            reads = "qkv_input" if name == ATTENTION else "input"
            alone = len(TENSORS[plain(site)]) == 1 or plain(site) == "all_inputs"
            why = self.together.get(name) if reads in TENSORS[plain(site)] else None
            # Beside attention's maps an FFN without a gate has nothing to be parted, and is welcome.
            if why is not None and (alone or why != ONE_MAP):
                raise AtlasError(f"models.{model}: '{site}': in its {name}, {why}")

    def _check_layers(self, model: str, site: str) -> None:
        """Refuse layers that have no such site, all of those that have it, and another spelling of them."""
        named = layers_named(site)
        if not named:
            return
        each = by_projection(site)
        spelled = confined(plain(site), parts_named(site), named, each=each)
        if site != spelled:
            raise AtlasError(f"models.{model}: '{site}' is spelled '{spelled}'")
        there = self._layers_with(plain(site), parts_named(site))
        if not there:
            return
        missing = [layer for layer in named if layer not in there]
        has = confined("", (), sorted(there)).removeprefix("@")
        if missing:
            raise AtlasError(
                f"models.{model}: '{site}': layer {missing[0]} has none; those that have: {has}"
            )
        if there == set(named):
            raise AtlasError(
                f"models.{model}: '{site}' is '{in_every_layer(site)}' in this model, where no other layers "
                "have it: leave `layers` out"
            )

    def _layers_with(self, site: str, parts: Collection[str]) -> set[int]:
        """Layers that have a tensor of a site, in some of their parts or any."""
        concerned = self._concerned(site, parts)
        return {layer for name in concerned for layer in self.layers.get(name, ())}

    def _concerned(self, site: str, parts: Collection[str]) -> list[str]:
        """The parts in which a site is, of some that it is confined to, or of all."""
        tensors = set(TENSORS[site])
        attention = [ATTENTION] if tensors & set(ATTENTION_TENSORS) else []
        return attention + (
            list(parts or self.of_parts) if tensors - set(ATTENTION_TENSORS) else []
        )


def _described(part: Part) -> dict[str, Any]:
    """A part as `why_together` takes it."""
    if part.name == ATTENTION:
        return {"part": ATTENTION, "attention": part.describe()}
    return {"part": part.name, **part.describe()}


def _layers(places: Iterable[tuple[str, int]]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for name, layer in places:
        found.setdefault(name, set()).add(layer)
    return {name: frozenset(layers) for name, layers in found.items()}
