"""Stage `capture`: the activations of all requested sites, in one forward pass over a text.

Each site has a job and a manifest of its own. The first job of a model takes a lock and captures what
any of them lacks; the others find their tensors complete and write their manifest. With a site comes
the FFN's input, from which every output error can be computed.

Tensors leave the device on a stream of their own and are written by a thread while the model runs on; a
block is recorded when all of it is written. Host memory holds a block in hand (one tensor of one layer
at a time where a block is one batch, as with large models) and PENDING of its tensors that are being
written.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.activations import ActivationStore, check_space, chunk_sequences
from sparsity_atlas.code import code_version
from sparsity_atlas.devices import pick_device, pick_dtype
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.journal import Journal
from sparsity_atlas.models import check_sites, from_manifest, load, load_tokenizer
from sparsity_atlas.store import digest, locked, write_manifest
from sparsity_atlas.terms import STORED, TENSORS
from sparsity_atlas.texts import digest_of, pinned, token_ids

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from sparsity_atlas.checkpoint import Checkpoint

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Tensors of a block that may wait for the disk.
PENDING = 4


def tensors_of(sites: Iterable[str]) -> list[str]:
    """Tensors that are stored for some sites: theirs, and the FFN's input."""
    return sorted({"input", *(tensor for site in sites for tensor in TENSORS[site])})


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> bool:
    """Whether sequences begin with BOS: as configured, else as the tokenizer does by itself."""
    if wanted is None:
        wanted = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return wanted and tokenizer.bos_token_id is not None


def capture(
    store_path: Path,
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    ids: np.ndarray,
    missing: list[str],
    fingerprint: str,
    settings: dict[str, Any],
) -> None:
    """Run `ids` through the model once and store the tensors in `missing`.

    Args:
        store_path: the Zarr store.
        manifest: the model's manifest.
        checkpoint: the model's files.
        ids: int64 [sequences, positions].
        missing: tensors to capture.
        fingerprint: of everything that the values depend on.
        settings: as `grid.capture_slice` gives it.

    Raises:
        AtlasError: no room on the disk, or NaN or infinity in an activation.
    """
    import torch

    from sparsity_atlas.sites import bind_ffns, observe
    from sparsity_atlas.spool import HostCopy, Writer, copy_stream

    model = load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    ffns = bind_ffns(model, manifest["ffn"])
    dtype = str(model.dtype).removeprefix("torch.")
    sequences, positions = ids.shape
    batch = settings["batch_size"]
    widths = {name: [ffn.size(name) for ffn in ffns] for name in missing}
    widest = max(max(row) for row in widths.values())
    chunk = chunk_sequences(widest * positions * ITEM_BYTES[dtype], batch, sequences)
    block = max(chunk, batch)  # sequences between two records of the journal

    total = ids.size * ITEM_BYTES[dtype] * sum(sum(row) for row in widths.values())
    journal_path = store_path.with_suffix(".journal")
    if not journal_path.exists():
        check_space(store_path, total)  # before anything is made
    store = ActivationStore(store_path, writable=True)
    plan = {
        "fingerprint": fingerprint,
        "tensors": missing,
        "chunk": chunk,
        "block": block,
        "dtype": dtype,
    }
    journal = Journal(journal_path, plan)
    if journal.records and any(name not in store.root for name in missing):
        # The store was deleted, the journal beside it was not.
        journal.delete()
        journal = Journal(journal_path, plan)
    if not journal.records:
        check_space(store_path, total)  # what another plan left may have been smaller
        cli.logger.info(
            "capturing %s: %s tokens, %.1f MiB", ", ".join(missing), f"{ids.size:,}", total / 2**20
        )
        store.put_ids(ids)
        for name in missing:
            store.create(name, widths[name], ids.size, chunk * positions, dtype)

    sites = [name for name in missing if name in ffns[0].sites()]
    stream = copy_stream(model.device)
    with Writer(PENDING) as writer:
        for start in range(len(journal.records) * block, sequences, block):
            rows = ids[start : start + block]
            parts: dict[tuple[str, int], list[HostCopy]] = defaultdict(list)
            checksums: dict[str, list[int]] = {name: [0] * len(ffns) for name in missing}
            batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]

            def write(
                layer: int,
                name: str,
                copies: list[HostCopy],
                checksums: dict = checksums,
                row: int = start * positions,
            ) -> None:
                whole = _stored([copy.wait() for copy in copies], layer, name)
                checksums[name][layer] = store.put(name, layer, row, whole)

            def keep(
                layer: int,
                name: str,
                values: Tensor,
                parts: dict = parts,
                count: int = len(batches),
                write: Callable = write,
            ) -> None:
                parts[name, layer].append(HostCopy(values, stream))
                # As soon as a block is whole: a large model's block is one batch of one layer.
                if len(parts[name, layer]) == count:
                    writer.submit(write, layer, name, parts.pop((name, layer)))

            with torch.no_grad(), observe(ffns, sites, keep):
                for one in batches:
                    model(input_ids=torch.from_numpy(one).to(model.device), use_cache=False)
            writer.drain()
            journal.append(checksums)
            cli.logger.info("captured %d of %d sequences", min(start + block, sequences), sequences)

    for name in missing:
        checks = [record[name] for record in journal.records]
        record = {"fingerprint": fingerprint, "dtype": dtype, "rows": block * positions}
        store.finish(name, {**record, "blocks": checks})
    store.sweep()
    journal.delete()


def _stored(batches: list[Tensor], layer: int, name: str) -> np.ndarray:
    """[tokens, channel] of some batches; bfloat16 as its bits."""
    import torch

    whole = torch.cat([one.reshape(-1, one.shape[-1]) for one in batches])
    if not torch.isfinite(whole).all():
        raise NumericalFailure(f"NaN or infinity in '{name}' of layer {layer}")
    return (whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole).numpy()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_atlas.capture", description=__doc__)
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

    manifest, checkpoint = from_manifest(arguments.model)
    check_sites(manifest["name"], [arguments.site], manifest["sites"])
    siblings = [site for site in arguments.siblings.split(",") if site in manifest["sites"]]
    tokenizer = load_tokenizer(checkpoint)
    text = pinned(settings["text"])
    ids = token_ids(
        text,
        tokenizer,
        settings["tokens"],
        settings["sequence_length"],
        starts_with_bos(tokenizer, settings["add_bos_token"]),
    )
    fingerprint = digest(
        {
            "model": manifest["digest"],
            "text": digest_of(ids),
            "dtype": _stored_dtype(settings, manifest),
            "batch_size": settings["batch_size"],
            "code": arguments.code or code_version("capture"),
        }
    )
    own = tensors_of([arguments.site])
    with locked(arguments.store.with_suffix(".lock")):
        done = _complete(arguments.store, fingerprint)
        if not set(own) <= set(done):
            missing = [name for name in tensors_of([arguments.site, *siblings]) if name not in done]
            capture(arguments.store, manifest, checkpoint, ids, missing, fingerprint, settings)
            done = _complete(arguments.store, fingerprint)
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


def _complete(store: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Records of the tensors that are complete under this fingerprint."""
    if not (store / "zarr.json").is_file():
        return {}
    opened = ActivationStore(store)
    records = {name: opened.complete(name) for name in STORED}
    return {
        name: record
        for name, record in records.items()
        if record and record["fingerprint"] == fingerprint
    }


if __name__ == "__main__":
    cli.run(main)
