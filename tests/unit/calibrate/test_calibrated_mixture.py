"""The stages on a captured mixture: calibrated by layer and by expert, exported, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mixtures import EACH, EXPERTS, save_mixture
from sparsity_atlas.activations import capture
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.calibrate import calibrate, export
from sparsity_atlas.criteria.calibration_file import Calibration, read_calibration
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models import manifest as models
from sparsity_atlas.terms import plain
from tiny_lm import run_stage, sentences, write_model_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LENGTH, SEEN, LEAST = 96, 8, 64, 36


class Work(NamedTuple):
    """A mixture with captured activations."""

    model: Path
    manifest: Path
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "activations.zarr"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("mixture")
    model = save_mixture(folder / "model", "qwen2_moe")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    path = write_model_manifest(model, folder / "model.json")
    settings = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "batch_size": 4},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "add_bos_token": None},
    }
    for site in ("all_inputs", "gate"):
        run_stage(
            capture,
            {
                **{"--model": path, "--site": site, "--settings": json.dumps(settings)},
                **{"--store": folder / "activations.zarr", "--code": "test"},
                "--output": folder / "capture" / f"{site}.json",
            },
        )
    return Work(model, path, folder)


def calibrated(work: Work, output: Path, site: str, **spec: Any) -> Calibration:
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": SEEN}
    run_stage(
        calibrate,
        {
            **{"--model": work.manifest},
            "--capture": work.folder / "capture" / f"{plain(site)}.json",
            **{"--store": work.store, "--criterion": json.dumps(spec), "--site": site},
            **{"--settings": json.dumps(loading), "--output": output, "--code": "test"},
        },
    )
    return read_calibration(output)


BY_EXPERT = {"calibration": "per_expert", "expert_rows": LEAST}


def test_states_are_those_of_the_store_s_rows(work: Work, tmp_path: Path) -> None:
    layered = calibrated(work, tmp_path / "layer.safetensors", "all_inputs", rule="teal")
    found = calibrated(work, tmp_path / "each.safetensors", "all_inputs", rule="teal", **BY_EXPERT)
    assert "served_by_layer" not in layered.about
    store, served = ActivationStore(work.store), found.about["served_by_layer"]
    for name, state in layered.states.items():
        assert torch.equal(found.states[name]["table"], state["table"])
    own = 0
    for layer in (0, 1):
        index = store.read("experts.index", layer, 0, SEEN)
        for tensor, each in (("input", 1), ("intermediate", EACH)):
            name = f"{tensor}.{layer}.experts"
            rows = store.read(f"experts.{tensor}", layer, 0, SEEN * each)
            ranked = np.sort(np.abs(rows).ravel())
            assert float(layered.states[name]["table"][5000]) == ranked[len(ranked) // 2]
            for expert in range(EXPERTS):
                token, place = np.nonzero(index == expert)
                assert (len(token) < LEAST) == (expert in served[name])
                assert (f"{name}.e{expert}" in found.states) == (len(token) >= LEAST)
                if len(token) >= LEAST:
                    ranked = np.sort(np.abs(rows[token * each + place * (each > 1)]).ravel())
                    table = found.states[f"{name}.e{expert}"]["table"]
                    assert float(table[5000]) == ranked[len(ranked) // 2]
                    own += 1
    assert own
    assert any(served.values())


def test_two_names_for_one_site_are_calibrated_once(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This model has no parts but these: whichever name comes second takes the other's file over."""
    names = ("gate@shared+experts", "gate")
    calls = []
    real = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda *a: calls.append(a) or real(*a))
    for rule, order in (("teal", names), ("chess", names[::-1])):
        paths = [tmp_path / rule / name / "calibration.safetensors" for name in order]
        identities = [
            calibrated(work, path, name, rule=rule, **BY_EXPERT).identity()
            for path, name in zip(paths, order, strict=True)
        ]
        assert identities[0] == identities[1]
    assert len(calls) == 2
    # Of some of its parts it is another one; and so it is with other settings, or where the file is damaged.
    other = tmp_path / "teal/gate@experts/calibration.safetensors"
    assert "gate.0.shared" not in calibrated(work, other, "gate@experts", rule="teal").states
    again = tmp_path / "teal/gate/calibration.safetensors"
    before = again.read_bytes()
    again.unlink()
    calibrated(work, again, "gate", rule="teal", calibration="per_expert", expert_rows=LEAST + 9)
    assert again.read_bytes() != before
    (tmp_path / "chess/gate/calibration.safetensors").write_bytes(b"nothing")
    (tmp_path / "chess/gate@shared+experts/calibration.safetensors").unlink()
    calibrated(
        work,
        tmp_path / "chess/gate@shared+experts/calibration.safetensors",
        names[0],
        rule="chess",
        **BY_EXPERT,
    )
    assert len(calls) == 5


def test_other_tensors_follow_from_input_and_routing(work: Work, tmp_path: Path) -> None:
    """CHESS at the gate wants E[u²] of each expert: here from the model's weights by hand."""
    found = calibrated(work, tmp_path / "c.safetensors", "gate", rule="chess", **BY_EXPERT)
    model: Any = AutoModelForCausalLM.from_pretrained(work.model)
    store = ActivationStore(work.store)
    seen = 0
    for layer in (0, 1):
        index = store.read("experts.index", layer, 0, SEEN)
        x = torch.from_numpy(store.read("experts.input", layer, 0, SEEN))
        weight = model.model.layers[layer].mlp.experts.gate_up_proj.detach()
        for expert in range(EXPERTS):
            state = found.states.get(f"gate.{layer}.experts.e{expert}")
            if state is not None:
                own = x[np.nonzero(index == expert)[0]]
                u = own @ weight[expert].chunk(2)[1].T
                torch.testing.assert_close(state["rms"], u.square().mean(0).sqrt())
                seen += 1
    assert seen


def test_the_same_bytes_again(work: Work, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        calibrated(work, path, "all_inputs", rule="teal", **BY_EXPERT)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_exported(work: Work, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    found = calibrated(work, path, "all_inputs", rule="teal", **BY_EXPERT)
    run_stage(
        export,
        {
            **{"--model": work.manifest, "--site": "all_inputs", "--calibration": path},
            **{"--criterion": json.dumps({"rule": "teal", **BY_EXPERT}), "--levels": "0.5"},
            **{"--settings": json.dumps({"dtype": "auto", "device": "cpu"})},
            "--output": tmp_path / "export" / "export.json",
        },
    )
    (file,) = tmp_path.rglob("thresholds.safetensors")
    tensors = load_file(file)
    for layer in (0, 1):
        for expert in range(EXPERTS):
            name = f"intermediate.{layer}.experts"
            own = found.states.get(f"{name}.e{expert}", found.states[name])
            assert torch.equal(tensors[f"{name}.e{expert}.threshold"], own["table"][5000])
        assert f"intermediate.{layer}.shared.threshold" in tensors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "chess"}, "Chess: cannot be used at 'gate' of layer 0's experts: what it finds"),
        ({"rule": "cats", "allocation": "sensitivity"}, "Cats: cannot be used at 'gate' of lay"),
    ],
)
def test_refused_where_it_is_calibrated(
    work: Work, tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(AtlasError, match=message):
        calibrated(work, tmp_path / "c.safetensors", "gate", **spec)
    assert not list(tmp_path.iterdir())


def test_refused_where_the_model_is_described(work: Work, tmp_path: Path) -> None:
    """What the run asks for in vain ends the first job of a mixture, before anything is captured."""
    lines = ["criteria.r_sparse at input: it would keep", "criteria.mask at gate: it looks"]
    arguments = {
        **{"--name": "tiny", "--source": json.dumps({"path": str(work.model)})},
        **{"--not-in-experts": json.dumps(lines), "--output": tmp_path / "model.json"},
    }
    with pytest.raises(AtlasError, match=r"^models\.tiny: criteria\.r_sparse at input: it would k"):
        run_stage(models, arguments)
    assert not list(tmp_path.iterdir())
