"""Stage `capture`: the activations of all requested sites, in one forward pass over a text.

Each site has a job and a manifest of its own. The first job of a model takes a lock and captures what
any of them lacks; the others find their tensors complete and write their manifest. With a site comes
what each part's output follows from: its input, and of routed experts the routing (see `layout`).

Tensors leave the device on a stream of their own and are written by threads while the model runs on: a
part (a chunk of each array, or a batch where that is more) is written while the next one is captured, and
recorded when all of it is written. Of a part that is one batch PENDING tensors wait at most, since they come
one by one. What is not recorded when a capture is killed is captured again, so
that no more than a block is under way: two chunks of each array, or a batch where that is more. Host
memory holds a block, at most MOST_HELD bytes; where that is too little, a part (of a batch, as with large
models, the tensor in hand) and PENDING tensors that are being written. To that comes a copy for each
thread, where a part is several batches, and up to as much again where pinned memory is handed out in
powers of two.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.activations.layout import Group, group_name, groups
from sparsity_atlas.activations.masks import masked
from sparsity_atlas.activations.store import ActivationStore, check_space, chunk_sequences
from sparsity_atlas.activations.texts import digest_of, pinned, token_ids
from sparsity_atlas.code_version import code_version
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.whole import digest, locked, write_manifest
from sparsity_atlas.loading.devices import how, pick_device, pick_dtype
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.models.bos import begins_with_bos
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.models.memory import (
    MOST_HELD,
    PENDING,
    Largest,
    Sizes,
    of_a_capture,
    of_a_pass,
)
from sparsity_atlas.progress import Progress
from sparsity_atlas.sites.available import Available
from sparsity_atlas.terms import DIFFUSION, KINDS, TENSORS, plain

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from sparsity_atlas.loading.checkpoint import Checkpoint


def tensors_of(sites: Iterable[str]) -> list[str]:
    """Tensors that are stored for some sites: theirs, and the FFN's input."""
    return sorted({"input", *(tensor for site in sites for tensor in TENSORS[site])})


def capture(
    store_path: Path,
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    ids: np.ndarray,
    missing: Mapping[str, Group],
    fingerprint: str,
    settings: dict[str, Any],
) -> None:
    """Run `ids` through the model once and store the tensors in `missing`.

    Args:
        store_path: the Zarr store.
        manifest: the model's manifest.
        checkpoint: the model's files.
        ids: int64 [sequences, positions].
        missing: tensors to capture, by name.
        fingerprint: of everything that the values depend on.
        settings: as `grid.capture_slice` gives it.

    Raises:
        AtlasError: no room on the disk, or NaN or infinity in an activation.
    """
    import torch

    from sparsity_atlas.activations.captured_part import CapturedPart
    from sparsity_atlas.activations.spool import Writer, copy_stream
    from sparsity_atlas.models.logits import head
    from sparsity_atlas.models.positions import check_positions
    from sparsity_atlas.sites.find import bind_parts, observe_places

    model = load(checkpoint, **how(settings))
    check_positions(model, ids.shape[1], "capture: sequence_length")
    # Nobody looks at the logits: those of a batch may be larger than all that is captured of it.
    headless = head.shown_the_last(model)
    parts = bind_parts(model, manifest["ffn"])
    dtype = str(model.dtype).removeprefix("torch.")
    sequences, positions = ids.shape
    batch = settings["batch_size"]
    arrays = [size for group in missing.values() for size in group.token_bytes(dtype)]
    chunk = chunk_sequences(max(arrays) * positions, batch, sequences)
    part = max(chunk, batch)  # sequences between two records of the journal
    token_bytes = sum(arrays)
    # Parts that are captured or written.
    under_way = 2 if chunk >= batch and 2 * chunk * positions * token_bytes <= MOST_HELD else 1

    _check_room(manifest, model, (positions, batch), arrays, settings)
    plan = {
        "fingerprint": fingerprint,
        "tensors": list(missing),
        "chunk": chunk,
        "part": part,
        "dtype": dtype,
    }
    store, journal = _begun(store_path, plan, ids, missing, ids.size * token_bytes)

    places = [
        (one, name)
        for one in parts
        for name in one.observable
        if group_name(one.name, name) in missing
    ]
    stream = functools.cache(copy_stream)
    recorded: deque[Future[None]] = deque()
    # All of a part and its record, where it comes at once; tensors of a single batch come one by one.
    pending = len(arrays) + 1 if under_way == 2 and part > batch else PENDING
    progress = Progress("captured", sequences, "sequences")
    with headless, Writer(pending, threads=min(PENDING, torch.get_num_threads())) as writer:
        for start in range(len(journal.records) * part, sequences, part):
            while len(recorded) >= under_way:
                recorded.popleft().result()
            rows = ids[start : start + part]
            batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]
            one = CapturedPart(store, missing, dtype, start * positions, len(batches))

            def record(
                before: list[Future[None]],
                one: CapturedPart = one,
                end: int = start + len(rows),
            ) -> None:
                # In order, also if more parts than these were under way.
                for each in before:
                    each.result()
                journal.append(one.checksums())
                progress.reach(end)

            keep = functools.partial(one.keep, writer=writer, stream=stream)
            with torch.no_grad(), observe_places(model, places, keep):
                for each in batches:
                    model(input_ids=torch.from_numpy(each).to(model.device), use_cache=False)
            recorded.append(writer.submit(record, list(recorded)))
        writer.drain()

    _finish(store, journal, missing, fingerprint, dtype, part * positions)


def _begun(
    path: Path,
    plan: dict[str, Any],
    ids: np.ndarray,
    missing: Mapping[str, Group],
    total: int,
) -> tuple[ActivationStore, Journal]:
    """The store and the journal of a capture that goes on, or that begins with empty arrays.

    Args:
        path: of the store.
        plan: what the journal is of: the capture's fingerprint, and how it is cut.
        ids: int64 [sequences, positions].
        missing: tensors to capture, by name.
        total: bytes of all.

    Raises:
        AtlasError: no room on the disk.
    """
    journal_path = path.with_suffix(".journal")
    if not journal_path.exists():
        check_space(path, total)  # before anything is made
    store = ActivationStore(path, writable=True)
    journal = Journal(journal_path, plan)
    if journal.records and any(name not in store.root for name in missing):
        # The store was deleted, the journal beside it was not.
        journal.delete()
        journal = Journal(journal_path, plan)
    if not journal.records:
        check_space(path, total)  # what another plan left may have been smaller
        cli.logger.info(
            "capturing %s: %s tokens, %.1f MiB", ", ".join(missing), f"{ids.size:,}", total / 2**20
        )
        store.put_ids(ids)
        tokens = plan["chunk"] * ids.shape[1]
        for name, group in missing.items():
            store.create(name, group.shapes, ids.size, tokens, group.dtype(plan["dtype"]))
    return store, journal


def _finish(
    store: ActivationStore,
    journal: Journal,
    missing: Mapping[str, Group],
    fingerprint: str,
    dtype: str,
    rows: int,
) -> None:
    """Write down that tensors are complete, of blocks of so many rows."""
    for name, group in missing.items():
        layers = list(group.shapes)
        store.finish(
            name,
            {
                **{"fingerprint": fingerprint, "dtype": group.dtype(dtype)},
                **{"rows": rows, "blocks": [one[name] for one in journal.records]},
                # What is not said here: all from the first on.
                **({} if layers == list(range(len(layers))) else {"layers": layers}),
            },
        )
    store.sweep()
    journal.delete()


def _check_room(
    manifest: dict[str, Any],
    model: PreTrainedModel,
    shape: tuple[int, int],
    arrays: list[int],
    settings: dict[str, Any],
) -> None:
    """See that a batch of `shape` (positions, sequences) and what is kept of it fit into memory."""
    import torch

    from sparsity_atlas.loading import free_memory
    from sparsity_atlas.loading.placement import tightest

    positions, batch = shape
    item, device, sizes = model.dtype.itemsize, tightest(model), Sizes.of(manifest)

    def running(share: float) -> int:
        tokens = int(batch * positions * share)
        largest = Largest(tokens, positions, max(int(batch * share), 1))
        return of_a_pass(sizes, largest, item, device.type, 0)

    def held(share: float) -> int:
        tokens = int(batch * positions * share)
        return of_a_capture(arrays, tokens, settings["tokens"], pinned=device.type == "cuda")

    what = f"capture: batches of {batch} x {positions} tokens"
    keys = (("batch_size", batch), ("capture.sequence_length", positions))
    if device.type == "cpu":
        free_memory.check(device, lambda share: running(share) + held(share), what, keys)
        return
    free_memory.check(device, running, what, keys)
    free_memory.check(torch.device("cpu"), held, what, keys)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas capture", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True, help="site whose manifest is written")
    parser.add_argument(
        "--siblings", default="", help="comma-separated sites that are captured with it"
    )
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: text, tokens, model loading"
    )
    parser.add_argument("--code", help="code version, part of the fingerprint; unset: of this code")
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    arguments = parser.parse_args()
    settings = arguments.settings

    manifest, checkpoint = from_manifest(arguments.model, kinds=KINDS)
    Available.in_manifest(manifest).check(manifest["name"], arguments.site)
    asked = map(plain, arguments.siblings.split(","))
    siblings = [site for site in dict.fromkeys(asked) if site in manifest["sites"]]
    tokenizer = load_tokenizer(checkpoint, add_bos_token=settings["add_bos_token"])
    text = pinned(settings["text"])
    bos = begins_with_bos(tokenizer, settings["add_bos_token"])
    ids = token_ids(text, tokenizer, settings["tokens"], settings["sequence_length"], bos)
    if manifest["kind"] == DIFFUSION:
        ids = masked(ids, manifest["mask_token_id"], kept=int(bos))
    fingerprint = digest(
        {
            "model": manifest["digest"],
            "text": digest_of(ids),
            "dtype": _stored_dtype(settings, manifest),
            "batch_size": settings["batch_size"],
            "code": arguments.code or code_version("capture"),
        }
    )
    own = groups(manifest["ffn"], [arguments.site])
    wanted = groups(manifest["ffn"], [arguments.site, *siblings])
    with locked(arguments.store.with_suffix(".lock")):
        done = _complete(arguments.store, wanted, fingerprint)
        if not set(own) <= set(done):
            missing = {name: group for name, group in wanted.items() if name not in done}
            capture(arguments.store, manifest, checkpoint, ids, missing, fingerprint, settings)
            done = _complete(arguments.store, wanted, fingerprint)
    write_manifest(
        arguments.output,
        {
            "site": arguments.site,
            "fingerprint": fingerprint,
            "tokens": int(ids.size),
            "sequence_length": int(ids.shape[1]),
            "tensors": {name: done[name] for name in own},
            # A local file is known by the digest of its tokens, which is in the fingerprint.
            **({"text": text} if "hub" in text else {}),
        },
    )


def _stored_dtype(settings: dict[str, Any], manifest: dict[str, Any]) -> str:
    dtype = pick_dtype(settings["dtype"], pick_device(settings["device"]))
    return str(manifest["dtype"]) if dtype == "auto" else dtype


def _complete(store: Path, names: Iterable[str], fingerprint: str) -> dict[str, dict[str, Any]]:
    """Records of those tensors that are complete under this fingerprint."""
    if not (store / "zarr.json").is_file():
        return {}
    opened = ActivationStore(store)
    records = {name: opened.complete(name) for name in names}
    return {
        name: record
        for name, record in records.items()
        if record and record["fingerprint"] == fingerprint
    }
