"""Tables of positions are found by what is looked up in them, and nothing goes beyond their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsity_atlas.activations import capture
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.models.positions import check_positions, positions
from tiny_lm import (
    CHOICE,
    choice_documents,
    open_session,
    run_stage,
    sentences,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)
from tiny_models import ARCHITECTURES, COMMON, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES = {
    "gpt2",
    "gpt_bigcode",
    "gptj",
    "openai-gpt",
    "opt",
    "opt-projected",
    "bert-decoder",
    "ctrl",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_is_as_long_as_the_model_can_run(name: str) -> None:
    model = tiny_model(name)
    found = positions(model)
    assert found == (64 if name in TABLES else None)
    if found:
        model(token_ids(1, found))
        with pytest.raises((IndexError, RuntimeError)):
            model(token_ids(1, found + 1))
        check_positions(model, found, "max_length")
        with pytest.raises(AtlasError, match=r"^max_length: 65 tokens.* 64 positions"):
            check_positions(model, found + 1, "max_length")
    else:
        check_positions(model, 4096, "max_length")


def test_a_table_that_grows_is_no_limit() -> None:
    settings = {**COMMON, "d_model": 16, "attention_heads": 2, "num_layers": 2, "ffn_dim": 40}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xglm", **settings)).eval()
    assert positions(model) == 64
    check_positions(model, 100, "max_length")
    with torch.no_grad():
        model(token_ids(1, 100))


def write_model(folder: Path, kind: str, **settings: Any) -> Path:
    config = AutoConfig.for_model(kind, vocab_size=300, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return write_model_manifest(folder, folder.with_suffix(".json"))


def test_a_model_without_attention_keeps_no_keys_to_ask_for_their_number() -> None:
    """Layers of a Jamba before its first attention; a cache of theirs has no length."""
    settings = {**COMMON, "attn_layer_period": 8, "attn_layer_offset": 7, "mamba_dt_rank": 4}
    settings |= {"num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8}
    config = AutoConfig.for_model("jamba", **settings)
    assert positions(AutoModelForCausalLM.from_config(config).eval()) is None


def test_more_than_the_model_has_is_refused_before_anything_runs(tmp_path: Path) -> None:
    manifest = write_model(
        tmp_path / "learned", "gpt2", n_positions=32, n_embd=24, n_layer=2, n_head=2
    )
    entry = write_task(tmp_path / "tasks", "choice", choice_documents(), **CHOICE)
    with pytest.raises(AtlasError, match=r"^models.learned: max_length: 48 tokens.* 32 positions"):
        open_session(manifest, {"choice": entry}, max_length=48)
    assert open_session(manifest, {"choice": entry}).lm.max_length == 32

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(40)))
    settings = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "tokens": 80},
        **{"sequence_length": 40, "batch_size": 2, "add_bos_token": None},
    }
    arguments = {
        **{"--model": manifest, "--site": "intermediate", "--code": "test"},
        **{"--settings": json.dumps(settings), "--store": tmp_path / "store.zarr"},
        "--output": tmp_path / "intermediate.json",
    }
    with pytest.raises(AtlasError, match=r"^capture: sequence_length: 40 tokens.* 32 positions"):
        run_stage(capture, arguments)


def test_what_ends_behind_a_length_without_a_table_fails_its_task(tmp_path: Path) -> None:
    """MPT makes its ALiBi for a number of positions, and has no table of them."""
    manifest = write_model(
        tmp_path / "alibi",
        "mpt",
        d_model=24,
        n_layers=2,
        n_heads=2,
        expansion_ratio=2,
        max_seq_len=32,
    )
    documents = choice_documents(4)
    long = [one | {"context": " ".join([one["context"]] * 6)} for one in documents]
    tasks = {
        "short": write_task(tmp_path, "short", [d | {"context": "a"} for d in documents], **CHOICE),
        "long": write_task(tmp_path, "long", long, **CHOICE),
    }
    result = evaluate_node(open_session(manifest, tasks), None, tmp_path / "dense")["tasks"]
    assert result["short"]["status"] == "ok"
    assert result["long"]["status"] == "failed"
    assert "max_length: the model does not run" in result["long"]["reason"]
