"""What is known of a model before a run: sizes, tokens and speed, or why they are not known."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from sparsity_atlas.activations.layout import stored_type
from sparsity_atlas.config import grid
from sparsity_atlas.config.model_entry import DiffusionSettings
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.timings import timings
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.lm.prompts import PromptSettings
from sparsity_atlas.loading.devices import ITEM_BYTES, pick_device, pick_dtype
from sparsity_atlas.loading.pretrained import blank, load, load_tokenizer, moved
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.models.causality import mask_token_of
from sparsity_atlas.models.layer_settings import in_layers
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.plan.dry_masked import DryMaskedLM
from sparsity_atlas.plan.dry_run import Dry, DryLM, TaskCost, count
from sparsity_atlas.plan.rates import TimedLM, node_seconds
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.find import find_parts, sees_earlier_only
from sparsity_atlas.sites.part import by_layer
from sparsity_atlas.speed.decoder import STEPS
from sparsity_atlas.speed.token_times import made_for
from sparsity_atlas.terms import ATTENTION, ROUTING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.loading.checkpoint import Checkpoint
    from sparsity_atlas.sites.part import Part
    from sparsity_atlas.tasks.loaded import LoadedTask

NodeKey = tuple[str, str] | None
"""Criterion and site; None for the dense baseline."""


class Unknowns(dict[str, list[str]]):
    """What could not be found out, by the reason."""

    def note(self, what: str, reason: BaseException | str) -> None:
        """Add one thing."""
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        self.setdefault(lines[0], []).append(what)


@dataclass
class Outlook:
    """What is known of a model; what is empty is not known.

    Attributes:
        parameters: those that a text passes, once the sites are found; until then all.
        loaded: all of them, also for images and sound.
        active: of a mixture of experts those that a token meets, once it is known.
        dtype: of the computation, and so of the activations.
        layers: how many.
        shapes: entries of each tensor of a token, for each part of each layer, of routed experts those of
            the routing as well; attention's are the first part's.
        costs: what one evaluation of each task takes.
        ready: seconds until the device is ready, the weights are loaded and the sites found.
        first: how many more the first passes over its tasks take in each process.
        seconds: of one evaluation's forward passes, by criterion and site, and by task.
    """

    parameters: int | None = None
    loaded: int = 0
    active: int | None = None
    dtype: str = ""
    layers: int = 0
    shapes: list[dict[str, int]] = field(default_factory=list)
    costs: dict[str, TaskCost] = field(default_factory=dict)
    ready: float = 0.0
    first: float = 0.0
    seconds: dict[NodeKey, dict[str, float]] = field(default_factory=dict)

    @property
    def ffn_share(self) -> float | None:
        """Share of what a token meets, and so about of a pass's time, that are FFNs'; None if not known."""
        if not self.parameters or not self.shapes:
            return None
        # Three maps where the factors have a gate; two of them are most of it without. None where a layer is
        # an attention alone.
        weights = sum(3 * one.get("input", 0) * one.get("intermediate", 0) for one in self.shapes)
        return min(weights / (self.active or self.parameters), 1.0)

    def store_bytes(self, tokens: int, tensors: Sequence[str]) -> int:
        """Bytes of some tensors' activations before compression; with `input` comes the routing."""
        stored = (*tensors, *(ROUTING if "input" in tensors else ()))
        of_a_token = (
            shape.get(tensor, 0) * ITEM_BYTES[stored_type(tensor, self.dtype)]
            for tensor in stored
            for shape in self.shapes
        )
        return tokens * sum(of_a_token)


def captured_tokens(config: Config) -> int:
    """Tokens of a capture: whole sequences."""
    length = config.capture.sequence_length
    return -(-config.capture.tokens // length) * length


def find(source: dict[str, Any]) -> Checkpoint:
    """The model's configuration and tokenizer. Weights are not fetched.

    Raises:
        AtlasError: it is not here, and could not be fetched.
    """
    try:
        return resolve(source, offline=True, weights=False)[0]
    except AtlasError:
        if "path" in source:
            raise
    return resolve(source, weights=False)[0]


def look(
    config: Config,
    name: str,
    tasks: dict[str, LoadedTask],
    manifest: Path,
    unknowns: Unknowns,
) -> Outlook:
    """Find out about one model: all but its speed.

    Args:
        config: the configuration.
        name: of the model.
        tasks: of the model, as far as they could be loaded.
        manifest: where an earlier run may have left the model's manifest.
        unknowns: takes what could not be found out.

    Raises:
        AtlasError: times are asked for at more tokens than the model is made for.
    """
    outlook = Outlook()
    settings = json.loads(grid.evaluation_slice(config, name, ()))
    try:
        source = json.loads(grid.fetch_slice(config, name))
        checkpoint = find(source)
        # What the stage `model` refuses is no model to make here: of some methods to quantise, transformers'
        # configuration alone wants the package.
        checkpoint.config(weights="path" in source)
        with torch.device("meta"):
            empty = blank(checkpoint)
        tokenizer = load_tokenizer(checkpoint, add_bos_token=settings["add_bos_token"])
        lm = _dry(empty, tokenizer, settings, config.models[name].mask_token_id)
    except (AtlasError, OSError, ValueError, KeyError) as error:
        unknowns.note(name, error)
        return outlook
    _check_contexts(config, name, made_for(empty))
    outlook.parameters = outlook.loaded = empty.num_parameters()
    outlook.dtype = _dtype(settings, empty)
    described = read_manifest(manifest) if manifest.is_file() else None
    if described is not None:
        outlook.parameters = described["parameters"]["total"]
        outlook.active = described["parameters"].get("active")
        outlook.shapes = [_described(part) for part in described["ffn"]]
        outlook.layers = described["layers"]
    elif not experts_modules(empty):
        outlook.shapes = _configured(empty)
        outlook.layers = len(outlook.shapes)
    for task in tasks.values():
        try:
            with tempfile.TemporaryDirectory() as scratch:
                cost = count(lm, task, seed=config.seed, folder=Path(scratch))
        except Exception as error:  # noqa: BLE001 (a task's own code may raise anything)
            unknowns.note(f"{task.name} with {name}", error)
        else:
            outlook.costs[task.name] = cost
    return outlook


def _check_contexts(config: Config, name: str, most: int | None) -> None:
    """Refuse contexts that the model cannot have, of which each job of its curves would say so at its end."""
    asked = [one.contexts for (model, *_), one in timings(config).items() if model == name]
    context = max((context for some in asked for context in some), default=0)
    if most is not None and context and context + STEPS > most:
        raise AtlasError(
            f"config: speed: contexts: {context} and the {STEPS} tokens that are timed after it are more "
            f"than the {most} that {name} is made for; use at most {most - STEPS}"
        )


def _dry(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    mask_token: int | None,
) -> Dry:
    """What stands for a model without weights, by the kind that its configuration says."""
    options = {
        **{key: settings[key] for key in ("batch_size", "max_length")},
        **{"prompts": PromptSettings.of(settings), "kind": _device(settings).type},
    }
    if sees_earlier_only(model.config.get_text_config()):
        return DryLM(model, tokenizer, **options)
    return DryMaskedLM(
        model,
        tokenizer,
        mask_token=mask_token_of(model, mask_token) or 0,
        shifted=False,
        diffusion=DiffusionSettings(**settings.get("diffusion", {})),
        **options,
    )


def _device(settings: dict[str, Any]) -> torch.device:
    """Device that a model will run on, whether it is here or not."""
    device = settings["device"]
    return pick_device(device) if device == "auto" else torch.device(device)


def _dtype(settings: dict[str, Any], model: PreTrainedModel) -> str:
    """Type that the model will compute in, also where its device is not here."""
    dtype = pick_dtype(settings["dtype"], _device(settings))
    own = str(model.config.get_text_config().dtype or torch.float32)
    return own.removeprefix("torch.") if dtype == "auto" else dtype


def _described(part: dict[str, Any]) -> dict[str, int]:
    """Of a part's tensors, as proved by an earlier run."""
    if part.get("part") == ATTENTION:
        own = part["attention"]
        return {"qkv_input": own["hidden"], "o_input": own["width"]}
    # Of routed experts, which are K for a token.
    width = part["width"] * part.get("each", 1)
    routing = dict.fromkeys(ROUTING, part["each"]) if "each" in part else {}
    if "attention" not in part and "part" in part:  # not the first of its layer
        own = {name: width if name in _WIDE else part["hidden"] for name in ("input", *_WIDE)}
        return own | routing
    return _widths(part["hidden"], width, (part.get("attention") or {}).get("width")) | routing


def _configured(model: PreTrainedModel) -> list[dict[str, int]]:
    """Of the tensors of each layer of a dense model, as its configuration says."""
    text = model.config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    found = []
    for hidden, width, heads, head in zip(*(in_layers(text, name) for name in names), strict=True):
        if not (isinstance(hidden, int) and isinstance(width, int)):
            return []
        attended = heads * head if isinstance(heads, int) and isinstance(head, int) else None
        found.append(_widths(hidden, width, attended))
    return found


_WIDE = ("up", "gate", "intermediate")


def _widths(hidden: int, width: int, attended: int | None) -> dict[str, int]:
    """Entries of each tensor; what the attention's output map reads is mostly as wide as the model."""
    return {
        **dict.fromkeys(("qkv_input", "input"), hidden),
        "o_input": hidden if attended is None else attended,
        **dict.fromkeys(_WIDE, width),
    }


def _proved(layer: list[Part]) -> Iterator[dict[str, int]]:
    """Of the tensors of each part of a layer; attention's with the first of the others."""
    sizes = []
    for part in layer:
        spread = part.routing("input")
        routing = {} if spread is None else dict.fromkeys(ROUTING, spread.each)
        sizes.append({tensor: part.size(tensor) for tensor in part.tensors} | routing)
    beside = [size for part, size in zip(layer, sizes, strict=True) if part.name != ATTENTION]
    attention = [size for part, size in zip(layer, sizes, strict=True) if part.name == ATTENTION]
    yield {name: entries for size in (*attention, *beside[:1]) for name, entries in size.items()}
    yield from beside[1:]


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where a model would be loaded."""
    free = psutil.virtual_memory().available
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def measure(config: Config, name: str, outlook: Outlook, nodes: dict[NodeKey, Node | None]) -> None:
    """Time a model's forward passes.

    Args:
        config: the configuration.
        name: of the model.
        outlook: takes the times, and the proven shapes of the FFNs.
        nodes: a node to time for each criterion and site.

    Raises:
        AtlasError: its device, its weights or one of the sites are not here, or it is too large.
    """
    source = json.loads(grid.fetch_slice(config, name))
    settings = json.loads(grid.evaluation_slice(config, name, ()))
    began = time.perf_counter()  # before anything asks for the device, which is made ready then
    device = pick_device(settings["device"])
    needed = outlook.loaded * ITEM_BYTES[outlook.dtype]
    free = _free_memory(device)
    if settings.get("device_map"):
        raise AtlasError("spread over devices (device_map), which is not timed here")
    if needed > 0.7 * free:
        raise AtlasError(
            f"too large to be timed here: {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )
    checkpoint, _ = resolve(source, offline=True)
    # On the CPU first: a job waits for a GPU of its own, a plan shares one.
    model = moved(load(checkpoint, dtype=outlook.dtype, device="cpu"), device)
    parts = find_parts(model, source.get("modules"))
    available = Available.in_parts(parts)
    available.check_all(name, grid.model_sites(config, name))
    outlook.ready = time.perf_counter() - began
    layers = by_layer(parts).values()
    outlook.layers = len(layers)
    outlook.shapes = [shape for own in layers for shape in _proved(own)]
    counted = count_parameters(model, parts)
    outlook.parameters, outlook.active = counted["total"], counted.get("active")
    lm = TimedLM(
        model, load_tokenizer(checkpoint), batch_size=settings["batch_size"], max_length=None
    )
    session = Session(lm, parts, {}, config.seed, {})
    outlook.first, times = node_seconds(session, list(nodes.values()), outlook.costs)
    outlook.seconds = dict(zip(nodes, times, strict=True))
