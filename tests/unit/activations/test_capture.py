"""Captured values, what is captured anew, and what is read from the store."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsity_atlas.activations import capture as stage
from sparsity_atlas.activations import metrics, store
from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.metrics import layer_metrics
from sparsity_atlas.activations.store import ActivationStore, chunk_sequences
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.studies import output_error
from tiny_lm import run_stage, save_model, sentences, write_model_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, TOKENS = 8, 100  # rounded up to 13 sequences
SITES = ("input", "up", "gate", "intermediate", "all_inputs")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sequences of the widest array, so that there are several chunks and blocks.
    monkeypatch.setattr(store, "CHUNK_BYTES", 2 * LENGTH * 40 * 4)


class Work(NamedTuple):
    """A model, a text and a folder of results."""

    manifest: Path
    text: Path
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "activations.zarr"


@pytest.fixture
def work(manifest: Path, tmp_path: Path) -> Work:
    """A model with text for 13 sequences."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    return Work(manifest, text, tmp_path / "results")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each forward pass."""
    calls: list[int] = []
    load = stage.load

    def watched(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = load(*arguments, **options)
        model.register_forward_pre_hook(
            lambda _, inputs, named: calls.append(len(named["input_ids"])), with_kwargs=True
        )
        return model

    monkeypatch.setattr(stage, "load", watched)
    return calls


def capture(work: Work, site: str, siblings: str = "", **changes: Any) -> dict[str, Any]:
    settings = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(work.text)}},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "batch_size": 3, "add_bos_token": None},
        **{key: value for key, value in changes.items() if key != "code"},
    }
    output = work.folder / "capture" / f"{site}.json"
    arguments = {
        **{"--model": work.manifest, "--site": site, "--siblings": siblings},
        **{"--settings": json.dumps(settings), "--store": work.store, "--output": output},
        "--code": changes.get("code", "test"),
    }
    run_stage(stage, arguments)
    return read_manifest(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def by_hand(folder: Path, ids: np.ndarray, dtype: torch.dtype) -> dict[tuple[str, int], np.ndarray]:
    """Every tensor of the FFNs by plain hooks on the modules, [tokens, channel]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    values: dict[tuple[str, int], list[torch.Tensor]] = {}
    for layer, block in enumerate(model.model.layers):
        mlp = block.mlp

        def into(name: str, layer: int = layer) -> Any:
            return lambda _, inputs: values.setdefault((name, layer), []).append(inputs[0])

        def out_of(name: str, layer: int = layer) -> Any:
            return lambda _, inputs, output: values.setdefault((name, layer), []).append(output)

        mlp.register_forward_pre_hook(into("input"))
        mlp.up_proj.register_forward_hook(out_of("up"))
        mlp.act_fn.register_forward_hook(out_of("gate"))
        mlp.down_proj.register_forward_pre_hook(into("intermediate"))
    with torch.no_grad():
        for start in range(0, len(ids), 3):
            model(torch.from_numpy(ids[start : start + 3]))
    return {key: torch.cat(parts).flatten(0, 1).float().numpy() for key, parts in values.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_plain_hooks(work: Work, model_folder: Path, dtype: str) -> None:
    manifest = capture(work, "all_inputs", "up,gate", dtype=dtype)
    assert set(manifest["tensors"]) == {"input", "intermediate"}
    assert manifest["tokens"] == 13 * LENGTH
    store = ActivationStore(work.store)
    ids = np.asarray(store.root["text/ids"])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    stream = [id for line in sentences(40) for id in [*tokenizer.encode(line), 2]]
    assert ids.flatten().tolist() == stream[: 13 * LENGTH]
    expected = by_hand(model_folder, ids, getattr(torch, dtype))
    for (name, layer), values in expected.items():
        assert np.array_equal(store.read(name, layer), values)
        stored = store.root[name][f"layer_{layer:03d}"]
        assert stored.attrs["dtype"] == dtype
        assert stored.dtype == ("uint16" if dtype == "bfloat16" else "float32")
        assert stored.nchunks > 2
    assert len(expected) == 8


def test_xarray_reads_it(work: Work) -> None:
    capture(work, "intermediate")
    data = xarray.open_zarr(work.store, group="input", consolidated=False)
    assert data["layer_001"].dims == ("token", "channel")
    values = ActivationStore(work.store).read("input", 1)
    assert np.array_equal(data["layer_001"].values, values)


def test_chunks_of_zeros_are_written(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s.zarr", writable=True)
    store.create("up", {0: Shape(1, 4)}, 6, 3, "float32")
    store.put("up", 0, 3, np.zeros((3, 4), np.float32))
    assert [path.name for path in tmp_path.glob("s.zarr/up/layer_000/c/*")] == ["1"]


def test_reading_ahead_is_by_one_and_in_order() -> None:
    begun: list[int] = []

    def read(part: slice) -> np.ndarray:
        begun.append(part.start)
        return np.arange(part.start, part.stop)

    parts = [slice(start, start + 2) for start in range(0, 8, 2)]
    for number, (part, values) in enumerate(store.read_ahead(read, parts)):
        assert part == parts[number]
        assert values.tolist() == [part.start, part.start + 1]
        assert len(begun) <= number + 2
    assert begun == [0, 2, 4, 6]
    assert list(store.read_ahead(read, [])) == []


def test_an_error_of_the_reader_is_raised() -> None:
    def fail(part: slice) -> np.ndarray:
        raise OSError(part.start)

    with pytest.raises(OSError, match="0"):
        list(store.read_ahead(fail, [slice(0, 1), slice(1, 2)]))


def test_siblings_only_write_their_manifest(work: Work, forwards: list[int]) -> None:
    capture(work, "up", "up,intermediate,input")
    assert forwards == [3, 3, 3, 3, 1]
    before = contents(work.store)
    for site in ("intermediate", "input"):
        assert set(capture(work, site, "up,intermediate,input")["tensors"]) == {"input", site}
    assert len(forwards) == 5
    assert contents(work.store) == before


def test_a_site_added_captures_its_tensors_only(work: Work, forwards: list[int]) -> None:
    first = capture(work, "intermediate")
    before = contents(work.store)
    capture(work, "gate", "gate,intermediate")
    assert len(forwards) == 10
    after = contents(work.store)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"gate"}
    changed = {name for name in before if before[name] != after[name]}
    assert not {name for name in changed if name.startswith(("input/", "intermediate/"))}
    assert capture(work, "intermediate") == first
    assert len(forwards) == 10


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("blocks", [0, 1, 2, 4])
def test_interrupted_and_resumed(
    work: Work, forwards: list[int], blocks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = Work(work.manifest, work.text, work.folder.parent / "whole")
    capture(whole, "all_inputs")
    forwards.clear()
    append = stage.Journal.append

    def interrupted(journal: Any, record: Any) -> None:
        if len(journal.records) == blocks:
            raise Interrupted
        append(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Journal, "append", interrupted)
        with pytest.raises(Interrupted):
            capture(work, "all_inputs")
    assert not (work.folder / "capture" / "all_inputs.json").exists()
    done = len(forwards)
    assert done == blocks + 1
    capture(work, "all_inputs")
    assert len(forwards) - done == 5 - blocks
    assert contents(work.folder) == contents(whole.folder)


def test_a_block_is_recorded_when_it_is_written(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []
    put, append = ActivationStore.put, stage.Journal.append

    def late(store: ActivationStore, tensor: str, layer: int, *rest: Any) -> int:
        time.sleep(0.02)
        checksum = put(store, tensor, layer, *rest)
        written.append((tensor, layer))
        return checksum

    def after(journal: Any, record: dict[str, list[int]]) -> None:
        assert sorted(written) == [(name, layer) for name in sorted(record) for layer in (0, 1)]
        assert all(all(checksums) for checksums in record.values())
        written.clear()
        append(journal, record)

    monkeypatch.setattr(ActivationStore, "put", late)
    monkeypatch.setattr(stage.Journal, "append", after)
    capture(work, "all_inputs")


@pytest.mark.parametrize(
    ("fitting", "held", "under_way"),
    [(2, 2**30, 1), (3, 2**30, 2), (6, 2**30, 2), (3, 1000, 1), (6, 1000, 1)],
)
def test_no_more_than_a_block_is_under_way(
    work: Work,
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
    fitting: int,
    held: int,
    under_way: int,
) -> None:
    """The next part is captured while one is written, unless it is a large batch or both are too much."""
    monkeypatch.setattr(store, "CHUNK_BYTES", fitting * LENGTH * 40 * 4)
    monkeypatch.setattr(stage, "MOST_HELD", held)
    batches = max(1, fitting // 3)  # of a part
    put, append = ActivationStore.put, stage.Journal.append
    ahead: list[int] = []

    def wait(store: ActivationStore, *arguments: Any) -> int:
        end = time.monotonic() + 60
        while under_way == 2 and len(forwards) <= batches:
            assert time.monotonic() < end
            time.sleep(0.01)
        return put(store, *arguments)

    def record(journal: Any, checksums: Any) -> None:
        ahead.append(len(forwards) - batches * len(journal.records))
        append(journal, checksums)

    monkeypatch.setattr(ActivationStore, "put", wait)
    monkeypatch.setattr(stage.Journal, "append", record)
    capture(work, "up")
    assert max(ahead) <= under_way * batches
    assert ahead[0] > (under_way - 1) * batches
    assert len(forwards) == 5


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_the_writer_ends_the_capture(
    work: Work, forwards: list[int], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    put = ActivationStore.put

    def full(store: ActivationStore, tensor: str, layer: int, start: int, *rest: Any) -> int:
        if start > 0 and layer == 1:
            raise OSError(28, "No space left on device")
        return put(store, tensor, layer, start, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "put", full)
        with pytest.raises(OSError, match="No space left"):
            capture(work, "up")
    assert not (work.folder / "capture" / "up.json").exists()
    done = len(forwards)
    capture(work, "up")
    assert len(forwards) - done == 4
    whole = work._replace(folder=work.folder.parent / "whole")
    capture(whole, "up")
    assert contents(work.folder) == contents(whole.folder)


def test_a_store_that_was_deleted_under_its_journal(
    work: Work, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = stage.Journal.append

    def interrupted(journal: Any, record: Any) -> None:
        if len(journal.records) == 2:
            raise Interrupted
        append(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Journal, "append", interrupted)
        with pytest.raises(Interrupted):
            capture(work, "up")
    shutil.rmtree(work.store)
    forwards.clear()
    capture(work, "up")
    assert forwards == [3, 3, 3, 3, 1]
    assert ActivationStore(work.store).read("up", 1).any(axis=1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4},
        {"dtype": "bfloat16"},
        {"tokens": 60},
        {"sequence_length": 9},
        {"add_bos_token": True},
        {"code": "edited"},
        {"text": "edited"},
        {"weights": 1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_work_is_never_reused(
    work: Work, forwards: list[int], tmp_path: Path, changes: dict
) -> None:
    before = capture(work, "up")
    forwards.clear()
    if "text" in changes:
        work.text.write_text(work.text.read_text().replace("cat", "dog"))
        changes = {}
    if "weights" in changes:
        folder = save_model(tmp_path / "other", seed=1)
        path = write_model_manifest(folder, tmp_path / "other.json")
        work, changes = work._replace(manifest=path), {}
    after = capture(work, "up", **changes)
    assert forwards
    assert after["fingerprint"] != before["fingerprint"]
    fresh = work._replace(folder=work.folder.parent / "fresh")
    capture(fresh, "up", **changes)
    assert contents(work.folder) == contents(fresh.folder)


def test_a_disk_that_is_too_small(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work.text)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type(usage)(10**9, 10**9 - 99, 99))
    with pytest.raises(AtlasError, match=r"activations\.zarr: needs .* GiB are free"):
        capture(work, "up")
    assert not (work.folder / "capture" / "up.json").exists()
    assert not list(work.folder.glob("activations.zarr*"))
    assert not list(work.folder.glob("*.journal"))
    monkeypatch.undo()
    monkeypatch.setattr(store, "CHUNK_BYTES", 2 * LENGTH * 40 * 4)
    capture(work, "up")


def test_a_text_that_is_too_short(work: Work) -> None:
    with pytest.raises(AtlasError, match=r"text\.jsonl has [\d,]+ tokens, 100,000 are asked for"):
        capture(work, "up", tokens=100_000)


def test_nan_names_the_layer(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    load = stage.load

    def broken(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = load(*arguments, **options)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(stage, "load", broken)
    with pytest.raises(AtlasError, match="NaN or infinity in 'up' of layer 1"):
        capture(work, "up")


def test_bos_begins_each_sequence(work: Work) -> None:
    capture(work, "up", add_bos_token=True)
    ids = np.asarray(ActivationStore(work.store).root["text/ids"])
    assert (ids[:, 0] == 1).all()
    assert not (ids[:, 1:] == 1).any()


@pytest.mark.parametrize(
    ("sequence_bytes", "batch", "sequences"),
    [(2**20, 4, 100), (2**20, 16, 100), (2**26, 16, 100), (10, 16, 3), (10, 3, 1000)],
)
def test_chunks_fit_batches(sequence_bytes: int, batch: int, sequences: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 12 * 2**20)
        size = chunk_sequences(sequence_bytes, batch, sequences)
    assert size % batch == 0 or batch % size == 0
    assert size == 1 or size * sequence_bytes <= 12 * 2**20


# What is made of it


def test_metrics_of_a_site(work: Work) -> None:
    capture(work, "all_inputs")
    output = work.folder / "metrics.parquet"
    manifest = work.folder / "capture" / "all_inputs.json"
    run_stage(metrics, {"--capture": manifest, "--store": work.store, "--output": output})
    rows = pq.read_table(output).to_pylist()
    assert [(row["tensor"], row["layer"]) for row in rows] == [
        *(("input", 0), ("input", 1), ("intermediate", 0), ("intermediate", 1))
    ]
    store = ActivationStore(work.store)
    for row in rows:
        values = store.read(row["tensor"], row["layer"])
        assert row == {
            "tensor": row["tensor"],
            "layer": row["layer"],
            **layer_metrics(values),
            # Not asked for.
            **{"lid": None, "lid_geomle": None},
        }


def mask(values: torch.Tensor, level: float) -> torch.Tensor:
    keep = int(level * values.shape[-1])
    if keep == 0:
        return torch.zeros_like(values)
    smallest = values.abs().topk(keep, dim=-1).values[..., -1:]
    return values.where(values.abs() >= smallest, 0)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("block", [40 * 4 * 17, 2**26])
def test_output_error_by_hand(
    work: Work, model_folder: Path, site: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_error, "ERROR_BLOCK", block)
    capture(work, site)
    output = work.folder / "sparsity.parquet"
    arguments = {
        **{"--model": work.manifest, "--site": site, "--store": work.store},
        **{"--criterion": json.dumps({"rule": "topk"}), "--levels": "0.3,1,0"},
        **{"--settings": json.dumps({"dtype": "auto", "device": "cpu"}), "--output": output},
    }
    run_stage(output_error, arguments)
    rows = pq.read_table(output).to_pylist()
    assert {(row["level"], row["layer"]) for row in rows} == {
        (level, layer) for level in ("1", "0.3", "0") for layer in (0, 1)
    }
    store = ActivationStore(work.store)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for row in rows:
        mlp = model.model.layers[row["layer"]].mlp
        level = float(row["level"])
        x = torch.from_numpy(store.read("input", row["layer"]))
        zeros = []

        def drop(values: torch.Tensor, *sites: str, level: float = level, zeros: list = zeros):
            if site not in sites:
                return values
            dropped = mask(values, level)
            zeros.append((dropped == 0).float().flatten())
            return dropped

        with torch.no_grad():
            dense = mlp(x)
            x = drop(x, "input", "all_inputs")
            up, gate = mlp.up_proj(x), torch.nn.functional.silu(mlp.gate_proj(x))
            product = drop(up, "up") * drop(gate, "gate")
            sparse = mlp.down_proj(drop(product, "intermediate", "all_inputs"))
        error = (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)
        assert row["error"] == pytest.approx(float(error.mean()), rel=1e-4, abs=1e-6)
        assert row["sparsity"] == pytest.approx(float(torch.cat(zeros).mean()), abs=1e-7)
