"""A model that is spread over places gives what it gives in one piece, at every stage that loads one.

There is one device here: half of the layers lie on the disk, and come to the CPU when they run, as what
fits on no GPU lies in host memory.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from snakemake.utils import update_config
from transformers import AutoModelForCausalLM

from checkout import ROOT, smoke_config
from mixtures import tiny_mixture
from small_configs import small_config
from sparsity_atlas.activations import capture
from sparsity_atlas.calibrate import calibrate
from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading import devices, free_memory, placement
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.placement import in_words, spread
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sites.offloading import device_of, offloaded, present
from sparsity_atlas.sparsify.transfer import stacked
from sparsity_atlas.studies import output_error, sensitivity
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    rolling_documents,
    run_stage,
    save_model,
    sentences,
    settings,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LAYER_BYTES = 4 * (4 * 24 * 24 + 3 * 24 * 40 + 2 * 24)
EMBEDDING_BYTES = 4 * 300 * 24
# The embedding and two of four layers; accelerate keeps room for the largest module beside them, the head.
LIMITS: placement.Limits = {"cpu": 2 * EMBEDDING_BYTES + 2 * LAYER_BYTES + 1000, "disk": 2**30}
TOKENS, LENGTH, SEEN = 96, 16, 48
RULES = {
    "dense": ("", ""),
    "topp": ("all_linear_inputs", "0.8"),
    "wina": ("input", "0.6"),
    "topk": ("o_input", "0.5"),
}
ON_CPU = {"dtype": "auto", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers."""
    return save_model(tmp_path_factory.mktemp("spread") / "model", num_hidden_layers=4)


@pytest.fixture
def _in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model that is spread lie in part on the disk; others lie in memory as ever."""
    halved = partial(spread, limits=LIMITS, folder=str(tmp_path / "offloaded"))
    monkeypatch.setattr(placement, "spread", halved)


def stages(folder: Path, results: Path, loading: dict[str, str]) -> dict[str, Any]:
    """What every stage that loads a model leaves, and whether a part of it waited elsewhere.

    Args:
        folder: the model.
        results: an empty folder, beside which tasks and a text are written.
        loading: settings of the stages.
    """
    manifest = write_model_manifest(folder, results / "model.json")
    work = results.parent / "work"
    work.mkdir(parents=True, exist_ok=True)
    tasks = {
        "choice": write_task(work, "choice", choice_documents(5), **CHOICE),
        "rolling": write_task(work, "rolling", rolling_documents(2), **ROLLING),
        "written": write_task(work, "written", rolling_documents(2), **GENERATION),
    }
    text = work / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    session = Session.open(manifest, settings(tasks, **loading), "test")
    found: dict[str, Any] = {"waits": offloaded(session.lm.model)}
    for rule, (site, level) in RULES.items():
        node = Node.make({"rule": rule}, site, level, None) if rule != "dense" else None
        result = evaluate_node(session, node, results / rule)
        found[rule] = (
            {name: task["status"] for name, task in result["tasks"].items()},
            pq.read_table(results / rule / "samples.parquet").to_pylist(),
        )
    store = {"--model": manifest, "--store": results / "activations.zarr", "--site": "input"}
    captured = {
        **{"text": {"file": str(text)}, **loading},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "batch_size": 2, "add_bos_token": None},
    }
    calibrating = {**loading, "calibration_tokens": SEEN}
    seen = json.dumps(calibrating)
    topk = {"--criterion": json.dumps({"rule": "topk"}), "--levels": "0.5"}
    run_stage(
        capture,
        {
            **{**store, "--siblings": "all_linear_inputs", "--code": "test"},
            **{"--settings": json.dumps(captured), "--output": results / "input.json"},
        },
    )
    run_stage(
        output_error,
        {
            **{**store, **topk, "--settings": seen, "--output": results / "e.parquet"},
            "--masks": results / "m.parquet",
        },
    )
    few = {"batch_size": 4, "replicates": 100, "seed": 1}
    run_stage(
        sensitivity,
        {
            **{**store, **topk, "--settings": json.dumps({**calibrating, **few})},
            "--output": results / "s.parquet",
        },
    )
    run_stage(
        calibrate,
        {
            **{**store, "--capture": results / "input.json", "--code": "test"},
            "--criterion": json.dumps({"rule": "teal", "allocation": "equal_cett"}),
            **{"--settings": seen, "--output": results / "c.safetensors"},
        },
    )
    found["captured"] = read_manifest(results / "input.json")
    for name in ("e", "m", "s"):
        found[name] = pq.read_table(results / f"{name}.parquet").to_pylist()
    found["c"] = (results / "c.safetensors").read_bytes()
    return found


@pytest.mark.usefixtures("_in_two_places")
def test_every_stage_gives_the_same(folder: Path, tmp_path: Path) -> None:
    """The same kernels run on the same numbers: not a bit differs."""
    whole = stages(folder, tmp_path / "whole", ON_CPU)
    parted = stages(folder, tmp_path / "parted", {**ON_CPU, "device_map": "auto"})
    assert (whole.pop("waits"), parted.pop("waits")) == (False, True)
    assert {status for rule in RULES for status in whole[rule][0].values()} == {"ok"}
    assert parted == whole


@pytest.mark.usefixtures("_in_two_places")
def test_sites_are_proved_where_a_part_waits_elsewhere(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert describe(checkpoint, None, device_map="auto") == describe(checkpoint, None)


def test_what_lies_where_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    size = sum(one.nbytes for one in model.parameters())
    words = in_words(model, {"model.embed_tokens": 0, "model.layers": 1, "": "cpu"})
    assert [one.split(" on ")[1] for one in words.split(", ")] == ["cuda:0", "cuda:1", "cpu"]
    with caplog.at_level("INFO", "sparsity_atlas"):
        spread(model, [CPU], limits=LIMITS, folder=str(tmp_path))
    assert "GiB on cpu" in caplog.text
    assert "GiB on disk" in caplog.text
    waiting = sum(one.nbytes for one in model.parameters() if one.device.type == "meta")
    assert 0 < waiting < size


def test_a_module_that_waits_has_a_device_and_its_numbers(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    spread(model, [CPU], limits=LIMITS, folder=str(tmp_path))
    down = model.model.layers[3].mlp.down_proj
    assert down.weight.device.type == "meta"
    assert device_of(down) == device_of(model) == CPU
    with present(down):
        torch.testing.assert_close(down.weight, whole.model.layers[3].mlp.down_proj.weight)
    assert down.weight.device.type == "meta"
    with pytest.raises(ValueError, match="has no weights"):
        device_of(torch.nn.SiLU())


@pytest.mark.parametrize("kind", ["gemma3n_text", "nemotron_h"])
def test_parameters_count_alike_where_a_part_waits_elsewhere(kind: str, tmp_path: Path) -> None:
    """Also those that a layer reads of a module in it without calling that: a scale, or a convolution."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32).eval()
    whole = count_parameters(model)
    size = sum(one.nbytes for one in model.parameters())
    spread(model, [CPU], limits={"cpu": 6 * size // 10, "disk": 2**30}, folder=str(tmp_path))
    assert offloaded(model)
    assert count_parameters(model) == whole


def test_what_fits_nowhere_is_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(AtlasError, match="device_map: auto: LlamaForCausalLM fits into neither"):
        spread(model, [CPU], limits={"cpu": LIMITS["cpu"]})


def test_experts_must_lie_on_a_device(tmp_path: Path) -> None:
    model = tiny_mixture("qwen2_moe")
    spread(model, [CPU], limits={"cpu": 100_000, "disk": 2**30}, folder=str(tmp_path))
    assert offloaded(model)
    with pytest.raises(AtlasError, match="waits in host memory until it runs"):
        find_parts(model)


def test_a_gpu_that_is_too_small_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(free_memory, "free", lambda device: (2**30, 2**30, "this GPU has"))
    with pytest.raises(AtlasError, match=r"take 1\.5 GiB.* 1\.0 GiB are left; device_map: auto"):
        free_memory.check_on_device("model", 3 * 2**29, gpus[:1], spread=False)
    free_memory.check_on_device("model", 2**30, gpus[:1], spread=False)
    with caplog.at_level("INFO", "sparsity_atlas"):
        free_memory.check_on_device("model", 3 * 2**29, gpus, spread=True)
    assert "take 1.5 GiB; 1.0 + 1.0 GiB are left on the GPUs" in caplog.text


def test_every_gpu_is_claimed_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two jobs that want all of them do not wait for each other."""
    claimed: list[str] = []

    def claim(names: list[str], shares: int) -> int:
        assert shares == 1
        claimed.extend(names)
        return 0

    monkeypatch.setenv("SPARSITY_ATLAS_GPU_SHARES", "2")
    monkeypatch.setattr(devices, "_uuids", lambda: ["a", "b"])
    monkeypatch.setattr(devices, "_settle", lambda index: None)
    monkeypatch.setattr(devices, "claim_gpu", claim)
    devices._all_gpus.cache_clear()
    assert devices.own_devices(torch.device("cuda")) == [torch.device("cuda", i) for i in range(2)]
    devices._all_gpus.cache_clear()
    assert claimed == ["a", "b", "a-1", "b-1"]
    assert devices.own_devices(CPU) == [CPU]


@pytest.mark.parametrize("first", ["one", "all"])
def test_a_process_does_not_wait_for_what_it_holds(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(seconds: float) -> None:
        raise AssertionError("it waits for itself")

    monkeypatch.setenv("SPARSITY_ATLAS_GPU_SHARES", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(devices, "_uuids", lambda: ["a", "b"])
    monkeypatch.setattr(devices, "_settle", lambda index: None)
    monkeypatch.setattr(devices, "_claimed", [])
    monkeypatch.setattr(devices.time, "sleep", wait)
    for cached in (devices._all_gpus, devices._own_gpu):
        cached.cache_clear()
    cuda = torch.device("cuda")
    asked = [devices.own_device, devices.own_devices]
    found = [one(cuda) for one in (asked if first == "one" else reversed(asked))]
    for cached in (devices._all_gpus, devices._own_gpu):
        cached.cache_clear()
    every = [torch.device("cuda", index) for index in range(2)]
    assert found == ([every[0], every] if first == "one" else [every, every[0]])
    assert len(devices._claimed) == 4


def test_counts_of_several_devices_come_to_one() -> None:
    """`meta` stands for another device; what came of it has no numbers, and what was here has."""
    here = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    assert torch.equal(stacked(here, CPU), torch.tensor([[1, 2], [3, 4]]))
    meta = torch.device("meta")
    mixed = stacked([here[0], torch.empty(2, device=meta), here[1]], meta)
    assert mixed.shape == (3, 2)
    with pytest.raises(AssertionError, match="runs through all slots"):
        stacked([here[0], None], CPU)


def with_models(models: dict[str, Any]) -> Config:
    data = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    update_config(data, {**smoke_config(), "models": models})
    return parse(data)


def test_the_key_reaches_every_stage() -> None:
    config = with_models({"zoo-small": {"device_map": "auto"}})
    slices = (
        grid.fetch_slice(config, "zoo-small"),
        grid.capture_slice(config, "zoo-small"),
        grid.store_slice(config, "zoo-small"),
        grid.sensitivity_slice(config, "zoo-small"),
        grid.evaluation_slice(config, "zoo-small", ()),
    )
    assert all(json.loads(one)["device_map"] == "auto" for one in slices)
    assert "device_map" not in grid.evaluation_slice(with_models({}), "zoo-small", ())
