"""Stage `calibrate`: what a criterion needs to know of a model, from the captured activations.

One job a (model, criterion, site) finds what all levels need, so that a search may choose any of them.
Each layer is looked at by itself; the model is loaded for its weights, and run for some allocations only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.activations.layout import group_name
from sparsity_atlas.activations.sources import given, reader
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import create, source_file
from sparsity_atlas.criteria.calibration_file import read_calibration, write_calibration
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest, write_atomically
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.progress import told
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.part import chosen
from sparsity_atlas.terms import TENSORS, stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparsity_atlas.criteria import Criterion
    from sparsity_atlas.criteria.place import Place, State
    from sparsity_atlas.loading.checkpoint import Checkpoint
    from sparsity_atlas.sites.find import Part


class StoreSample:
    """A `place.Sample`: the first tokens of the store.

    The site's own tensors are what was captured; the part's others follow from its captured input.
    """

    def __init__(
        self, store: ActivationStore, part: Part, place: Place, site: str, tokens: int
    ) -> None:
        self._store = store
        self._part = part
        self._place = place
        self._site = site
        self._captured = {"input", *TENSORS[site]}
        self._tokens = tokens

    def read(self, tensor: str) -> Tensor:
        """One tensor of the part: float32 [tokens, width] on the place's device."""
        import torch

        place = self._place
        if tensor in self._captured:
            rows = self._store.rows(group_name(place.part.name, stored(tensor)), place.layer)
            values = torch.from_numpy(rows[: self._tokens * rows.each])
        elif tensor not in place.part.tensors:
            raise AtlasError(f"layer {place.layer}: {place.part.name}: has no tensor '{tensor}'")
        else:
            read = reader(self._store, self._part, self._site)
            values = self._part.recompute(given(read(slice(self._tokens)), self._part), tensor)
        return values.float().to(self._place.device)

    def routing(self) -> Tensor:
        """The experts of each token: int [tokens, K]."""
        import torch

        name = f"{self._part.name}.index"
        return torch.from_numpy(self._store.read(name, self._part.layer, 0, self._tokens)).long()


def calibrate(
    criterion: Criterion, parts: Sequence[Part], site: str, store: ActivationStore, tokens: int
) -> dict[str, State]:
    """Calibrate a criterion at every place of a site.

    Args:
        criterion: one that is calibrated.
        parts: all of one model.
        site: where.
        store: that model's activations.
        tokens: of the store, from its beginning.

    Returns:
        The state of each place, by `place.state_name`.

    Raises:
        AtlasError: the criterion cannot work at some place.
    """
    import torch

    from sparsity_atlas.calibrate.expert_states import states_of
    from sparsity_atlas.criteria.binding import check_places
    from sparsity_atlas.criteria.place import places, state_name

    check_places(criterion, parts, site, type(criterion).__name__)
    states = {}
    with torch.no_grad():
        uniform = criterion.allocation == "uniform"
        for part in told(parts, "calibrated", "parts") if uniform else parts:
            for place in places([part], site):
                sample = StoreSample(store, part, place, site, tokens)
                if place.experts:
                    found = states_of(criterion, place, sample, sample.routing())
                else:
                    found = {state_name(place.key): criterion.calibrate(place, sample)}
                for name, state in found.items():
                    states[name] = {key: value.float() for key, value in state.items()}
    if uniform:
        return states

    from sparsity_atlas.calibrate.allocation import allocate
    from sparsity_atlas.calibrate.allocation_cost import ERROR_TOKENS

    ids = store.ids()

    def inputs(part: Part, site: str) -> dict[str, Tensor]:
        return given(reader(store, part, site)(slice(min(tokens, ERROR_TOKENS))), part)

    shares = allocate(criterion, parts, site, states, inputs, ids[: tokens // ids.shape[1]])
    return {
        name: {**state, **{key: value.float() for key, value in shares[name].items()}}
        for name, state in states.items()
    }


def seen_text(checkpoint: Checkpoint, store: ActivationStore, tokens: int) -> tuple[str, str]:
    """The text of the first tokens of a store, and the digest of their ids."""
    ids = store.ids()
    rows = ids[: tokens // ids.shape[1]]
    tokenizer = load_tokenizer(checkpoint)
    # As one text: a row's first word may begin with a space that decoding it alone would drop.
    content = tokenizer.decode(rows.flatten(), skip_special_tokens=True)
    assert isinstance(content, str), "a list comes of several texts"
    return content, hashlib.sha256(rows.tobytes()).hexdigest()


def taken_over(output: Path, names: Sequence[str], about: Mapping[str, Any]) -> bool:
    """Write what the same site has under another name of it, if that was found with the same.

    Args:
        output: the calibration to write, of {criterion}/{site}.
        names: all names of its site in this model.
        about: what it is found with.
    """
    if output.parent.name not in names:
        return False
    for other in (output.parents[1] / name / output.name for name in names):
        if other == output or not other.exists():
            continue
        try:
            found = read_calibration(other).about
        except AtlasError:  # the job that makes it says so
            continue
        if {key: found.get(key) for key in about} == dict(about):
            write_atomically(output, partial(shutil.copyfile, other))
            return True
    return False


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas calibrate", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--capture", required=True, type=Path, help="the site's capture manifest")
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument("--site", required=True)
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: model loading, tokens"
    )
    parser.add_argument("--code", help="code version, part of the fingerprint; unset: of this code")
    parser.add_argument("--output", required=True, type=Path, help="calibration to write")
    arguments = parser.parse_args()

    spec, settings = arguments.criterion, arguments.settings
    criterion = create(spec)
    if not criterion.calibrated:
        raise AtlasError(f"criteria: {type(criterion).__name__} has nothing to calibrate")
    captured = read_manifest(arguments.capture)
    tokens = settings["calibration_tokens"]
    if not 0 < tokens < captured["tokens"]:
        raise AtlasError(
            f"calibration.tokens: {tokens} found, expected 1 to {captured['tokens'] - 1}: there are "
            f"{captured['tokens']} captured tokens, and some must be left to measure output errors on"
        )
    manifest, checkpoint = from_manifest(arguments.model)
    # By its plain name in what the file says: under either one it is the same calibration, to the byte.
    names = Available.in_manifest(manifest).names(manifest["name"], arguments.site)

    from sparsity_atlas.calibrate.expert_states import served_by_layer
    from sparsity_atlas.sites.find import bind_parts

    store = ActivationStore(arguments.store)
    for tensor in captured["tensors"]:
        store.check(tensor)
    content, text = seen_text(checkpoint, store, tokens)
    about: dict[str, Any] = {
        "model": manifest["digest"],
        "site": names[0],
        "criterion": {key: value for key, value in spec.items() if key != "file"},
        "capture": captured["fingerprint"],
        "code": arguments.code or code_version("calibrate", str(source_file(spec))),
        "tokens": tokens,
        "text": text,
        "content": content,
    }
    if taken_over(arguments.output, names, about):
        cli.logger.info("%s: calibrated before under another name of it", arguments.site)
        return
    model = load(checkpoint, **how(settings))
    parts, site = chosen(bind_parts(model, manifest["ffn"]), arguments.site)
    states = calibrate(criterion, parts, site, store, tokens)
    if criterion.calibration == "per_expert":
        about["served_by_layer"] = served_by_layer(parts, site, states)
    write_calibration(arguments.output, states, about)
    cli.logger.info("calibrated %d places on %s tokens", len(states), f"{tokens:,}")
    for place, experts in about.get("served_by_layer", {}).items():
        if experts:
            cli.logger.info(
                "%s: %d experts have fewer than %d rows and take the layer's state",
                *(place, len(experts), criterion.expert_rows),
            )
