"""What is known of a model before a run: sizes, tokens and speed, or why they are not known."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import Session
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.lm.prompts import PromptSettings
from sparsity_atlas.models.devices import pick_device, pick_dtype
from sparsity_atlas.models.loading import blank, load, load_tokenizer, moved
from sparsity_atlas.models.manifest import check_sites, resolve
from sparsity_atlas.models.memory import ITEM_BYTES
from sparsity_atlas.plan.dry_run import DryLM, TaskCost, count
from sparsity_atlas.plan.rates import TimedLM, free_memory, node_seconds
from sparsity_atlas.sites.find import find_parts, sites_of
from sparsity_atlas.sites.part import by_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from sparsity_atlas.models.checkpoint import Checkpoint
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
        parameters: all of them.
        dtype: of the computation, and so of the activations.
        shapes: entries of each tensor, for each layer.
        costs: what one evaluation of each task takes.
        ready: seconds until the weights are loaded and the sites found.
        seconds: of one evaluation's forward passes, by criterion and site, and by task.
    """

    parameters: int | None = None
    dtype: str = ""
    shapes: list[dict[str, int]] = field(default_factory=list)
    costs: dict[str, TaskCost] = field(default_factory=dict)
    ready: float = 0.0
    seconds: dict[NodeKey, dict[str, float]] = field(default_factory=dict)

    @property
    def ffn_share(self) -> float | None:
        """Share of the parameters, and so about of a pass's time, that are FFNs'; None if not known."""
        if not self.parameters or not self.shapes:
            return None
        # Three maps where the factors have a gate; two of them are most of it without.
        weights = sum(3 * one["input"] * one["intermediate"] for one in self.shapes)
        return min(weights / self.parameters, 1.0)

    def store_bytes(self, tokens: int, tensors: Sequence[str]) -> int:
        """Bytes of some tensors' activations before compression."""
        width = sum(shape.get(tensor, 0) for tensor in tensors for shape in self.shapes)
        return tokens * width * ITEM_BYTES[self.dtype]


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
    """
    outlook = Outlook()
    settings = json.loads(grid.evaluation_slice(config, name, ()))
    try:
        checkpoint = find(json.loads(grid.fetch_slice(config, name)))
        with torch.device("meta"):
            empty = blank(checkpoint)
        lm = DryLM(
            empty,
            load_tokenizer(checkpoint, add_bos_token=settings["add_bos_token"]),
            **{key: settings[key] for key in ("batch_size", "max_length")},
            prompts=PromptSettings.of(settings),
            kind=_device(settings).type,
        )
    except (AtlasError, OSError, ValueError, KeyError) as error:
        unknowns.note(name, error)
        return outlook
    outlook.parameters = empty.num_parameters()
    outlook.dtype = _dtype(settings, empty)
    outlook.shapes = _shapes(manifest, empty)
    for task in tasks.values():
        try:
            with tempfile.TemporaryDirectory() as scratch:
                cost = count(lm, task, seed=config.seed, folder=Path(scratch))
        except Exception as error:  # noqa: BLE001 (a task's own code may raise anything)
            unknowns.note(f"{task.name} with {name}", error)
        else:
            outlook.costs[task.name] = cost
    return outlook


def _device(settings: dict[str, Any]) -> torch.device:
    """Device that a model will run on, whether it is here or not."""
    device = settings["device"]
    return pick_device(device) if device == "auto" else torch.device(device)


def _dtype(settings: dict[str, Any], model: PreTrainedModel) -> str:
    """Type that the model will compute in, also where its device is not here."""
    dtype = pick_dtype(settings["dtype"], _device(settings))
    own = str(model.config.get_text_config().dtype or torch.float32)
    return own.removeprefix("torch.") if dtype == "auto" else dtype


def _shapes(manifest: Path, model: PreTrainedModel) -> list[dict[str, int]]:
    """Of the layers' tensors, as proved by an earlier run, else as the configuration says."""
    if manifest.is_file():
        return [
            _widths(ffn["hidden"], ffn["width"], (ffn.get("attention") or {}).get("width"))
            for ffn in read_manifest(manifest)["ffn"]
        ]
    text = model.config.get_text_config()
    hidden, width = (getattr(text, name, None) for name in ("hidden_size", "intermediate_size"))
    if not (isinstance(hidden, int) and isinstance(width, int)):
        return []
    heads, head = (getattr(text, name, None) for name in ("num_attention_heads", "head_dim"))
    attended = heads * head if isinstance(heads, int) and isinstance(head, int) else None
    return [_widths(hidden, width, attended)] * getattr(text, "num_hidden_layers", 0)


def _widths(hidden: int, width: int, attended: int | None) -> dict[str, int]:
    """Entries of each tensor; what the attention's output map reads is mostly as wide as the model."""
    return {
        **dict.fromkeys(("qkv_input", "input"), hidden),
        "o_input": hidden if attended is None else attended,
        **dict.fromkeys(("up", "gate", "intermediate"), width),
    }


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
    device = pick_device(settings["device"])
    needed = (outlook.parameters or 0) * ITEM_BYTES[outlook.dtype]
    free = free_memory(device)
    if needed > 0.7 * free:
        raise AtlasError(
            f"too large to be timed here: {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )
    began = time.perf_counter()
    checkpoint, _ = resolve(source, offline=True)
    # On the CPU first: a job waits for a GPU of its own, a plan shares one.
    model = moved(load(checkpoint, dtype=outlook.dtype, device="cpu"), device)
    parts = find_parts(model, source.get("modules"))
    check_sites(name, grid.model_sites(config, name), list(sites_of(parts)))
    outlook.ready = time.perf_counter() - began
    outlook.shapes = [
        {tensor: part.size(tensor) for part in own for tensor in part.tensors}
        for own in by_layer(parts).values()
    ]
    lm = TimedLM(
        model, load_tokenizer(checkpoint), batch_size=settings["batch_size"], max_length=None
    )
    session = Session(lm, parts, {}, config.seed, {})
    times = node_seconds(session, list(nodes.values()), outlook.costs)
    outlook.seconds = dict(zip(nodes, times, strict=True))
