"""PEFT adapters: merged where they are asked for, in the digest, and refused where they do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparsity_atlas.config.grid import fetch_slice
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.adapter import ADAPTER, SAFE_ADAPTER
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models import manifest as models
from sparsity_atlas.rules import inputs
from sparsity_atlas.rules.inputs import locate, model_content
from tiny_lm import save_model

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["up_proj", "q_proj"]}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"], rank_pattern={"q_proj": 1}),
    "ia3": IA3Config(target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
IDS = torch.arange(3, 27).reshape(2, 12)


def save_adapter(folder: Path, base: Path, config: Any, seed: int = 0) -> Path:
    """An adapter with random weights, as if it had been trained."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, LoraConfig(**LORA))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_computes_what_the_adapter_does(kind: str, base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base, KINDS[kind])
    merged = load(Checkpoint(base, adapter=folder), device="cpu")
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    plain = load(Checkpoint(base), device="cpu")
    assert type(merged) is type(plain)
    assert all(type(one).__module__.partition(".")[0] != "peft" for one in merged.modules())
    assert isinstance(merged.model.layers[0].mlp.up_proj, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, beside(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (merged(IDS).logits - plain(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changed", "tied"), [("embed_tokens", False), ("lm_head", False), ("embed_tokens", True)]
)
def test_of_tied_tables_those_are_changed_that_it_names(
    changed: str, tied: bool, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    more = {"init_lora_weights": False, "ensure_weight_tying": tied}
    config = LoraConfig(r=2, target_modules=[changed], **more)
    folder = save_adapter(tmp_path / "adapter", base, config)
    merged = load(Checkpoint(base, adapter=folder), device="cpu")
    merged.tie_weights()
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, beside(IDS).logits, rtol=1e-4, atol=1e-4)


def test_it_is_in_the_digest_and_in_the_manifest(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(base), "adapter": str(adapter)}
    output = tmp_path / "model.json"
    words = ["--name", "m", "--source", json.dumps(source), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["models", *words])
    models.main()
    found = read_manifest(output)
    assert found["adapter"] == {"type": "LORA", "made_for": str(base), "revision": None}
    assert found["digest"] != Checkpoint(base).digest()
    _, checkpoint = models.from_manifest(output)
    assert checkpoint.adapter == adapter
    weights = load_file(adapter / SAFE_ADAPTER)
    save_file({name: 2 * value for name, value in weights.items()}, adapter / SAFE_ADAPTER)
    with pytest.raises(AtlasError, match="changed since"):
        models.from_manifest(output)


@pytest.mark.parametrize("source", ["path", "hub"])
def test_snakemake_sees_an_edit_of_it(
    source: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the workflow finds it, beside itself, and beside a model of the Hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    entry = {source: str(base) if source == "path" else "a/b", "adapter": adapter.name}
    data = {
        "models": {"mine": entry},
        "criteria": {"topp": None},
        "texts": {"prose": {"file": "prose.jsonl"}},
        "tasks": {"pairs": {}},
        "run": [{"models": ["mine"]}],
    }
    config = parse(locate(data, adapter.parent))
    assert json.loads(fetch_slice(config, "mine"))["adapter"] == f"../{adapter.name}"
    before = model_content(config, "mine")
    edited(adapter, ADAPTER, {"lora_alpha": 8})
    # What a process has seen of a model it does not look at again.
    inputs._model_digest.cache_clear()
    assert len({model_content(config, "mine"), before, ""}) == 3


def edited(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    if name == ADAPTER:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_first(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(weights.items())[1:])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (SAFE_ADAPTER, without_first, "1 of its tensors are missing"),
        (
            SAFE_ADAPTER,
            lambda weights: {**weights, "base_model.model.odd.lora_A.weight": torch.ones(2, 2)},
            "1 of its tensors are not the model's .*odd",
        ),
        (SAFE_ADAPTER, lambda weights: {k: v[:1] for k, v in weights.items()}, "size mismatch"),
        (SAFE_ADAPTER, lambda weights: {k: v * torch.nan for k, v in weights.items()}, "NaN"),
        (ADAPTER, {"target_modules": ["nowhere"]}, "nowhere.*not found"),
        (ADAPTER, {"twisted": True}, "twisted: unknown to the installed peft"),
        (ADAPTER, {"peft_type": "SPLINES"}, "peft_type: unknown 'SPLINES'"),
        (ADAPTER, {"peft_type": None}, "expected a JSON object with 'peft_type'"),
        (ADAPTER, {"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
    ],
)
def test_what_does_not_fit(name: str, change: Any, says: str, base: Path, adapter: Path) -> None:
    edited(adapter, name, change)
    with pytest.raises(AtlasError, match=says) as caught:
        load(Checkpoint(base, adapter=adapter), device="cpu")
    assert "\n" not in str(caught.value)


def test_what_is_no_part_of_the_weights(base: Path, tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    folder = save_adapter(tmp_path / "adapter", base, prompt)
    with pytest.raises(AtlasError, match="PROMPT_TUNING cannot be merged"):
        load(Checkpoint(base, adapter=folder), device="cpu")


def test_folders_that_hold_none(base: Path, adapter: Path) -> None:
    with pytest.raises(AtlasError, match=r"expected a PEFT adapter, found no adapter_config\.json"):
        Checkpoint(base, adapter=base).config()
    torch.save(load_file(adapter / SAFE_ADAPTER), adapter / "adapter_model.bin")
    (adapter / SAFE_ADAPTER).unlink()
    with pytest.raises(AtlasError, match=r"found only adapter_model\.bin, a pickle.*allow_pickle"):
        Checkpoint(base, adapter=adapter).config()
    allowed = Checkpoint(base, adapter=adapter, allow_pickle=True)
    assert load(allowed, device="cpu").dtype == torch.float32
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(AtlasError, match=r"expected adapter_model\.safetensors, found none"):
        Checkpoint(base, adapter=adapter).config()
