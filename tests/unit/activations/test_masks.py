"""What a masked-diffusion model is shown of a captured text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from masked_diffusion import MASK, save_diffusion
from sparsity_atlas.activations import capture as stage
from sparsity_atlas.activations.masks import masked
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.studies import output_error
from tiny_lm import run_stage, sentences, write_model_manifest


def test_as_many_tokens_are_masked_in_one_sequence_as_in_another_are_not() -> None:
    ids = np.arange(40 * 21).reshape(40, 21)
    found = masked(ids, -1, kept=1)
    hidden = found == -1
    np.testing.assert_array_equal(found[~hidden], ids[~hidden])
    assert not hidden[:, 0].any()
    # Each number from 1 to 20 twice.
    assert sorted(hidden.sum(axis=1)) == sorted([*range(1, 21)] * 2)
    assert hidden.sum(axis=1).tolist() != sorted(hidden.sum(axis=1))
    assert hidden[:, 1:].sum(axis=0).min() > 10


def test_masks_follow_from_the_text_alone() -> None:
    ids = np.arange(60).reshape(6, 10)
    np.testing.assert_array_equal(masked(ids, -1, 0), masked(ids.copy(), -1, 0))
    other = masked(ids + 100, -1, 0)
    assert ((other == -1) != (masked(ids, -1, 0) == -1)).any()


@pytest.mark.usefixtures("one_thread")
def test_a_capture_is_of_masked_text_in_which_each_token_sees_all(tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "m")
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    settings = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "add_bos_token": None},
        **{"tokens": 64, "sequence_length": 8, "batch_size": 3},
    }
    at = {"--model": manifest, "--site": "intermediate", "--store": tmp_path / "activations.zarr"}
    out = tmp_path / "capture.json"
    run_stage(stage, {**at, "--siblings": "", "--settings": json.dumps(settings), "--output": out})
    store = ActivationStore(tmp_path / "activations.zarr")
    ids = store.ids()
    assert sorted((ids == MASK).sum(axis=1)) == list(range(1, 9))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(torch.from_numpy(ids))
    found = store.read("intermediate", 1)
    np.testing.assert_allclose(found, seen[0].numpy(), rtol=1e-4, atol=1e-5)
    errors = tmp_path / "errors.parquet"
    run_stage(
        output_error,
        {
            **at,
            **{"--criterion": json.dumps({"rule": "topp"}), "--levels": "0.5"},
            **{"--settings": json.dumps(settings), "--output": errors},
        },
    )
    assert errors.is_file()
