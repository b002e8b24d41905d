"""Models whose last layers reuse earlier ones' keys, and would be run over a prompt's last token alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models.logits import head
from tiny_lm import (
    GENERATION,
    open_session,
    rolling_documents,
    save_model,
    write_model_manifest,
    write_task,
)
from tiny_models import tiny_model

LAYERS, WIDTH = 4, 40
SHARED: dict[str, Any] = {
    **{"kind": "gemma4_text", "num_hidden_layers": LAYERS, "num_kv_shared_layers": 2},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 12},
    **{"global_head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 2},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300},
    **{"intermediate_size": WIDTH, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("shared") / "model", **SHARED)


def test_every_layer_sees_the_whole_prompt_where_texts_are_generated(
    folder: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path, "written", rolling_documents(3), **GENERATION)
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    session = open_session(manifest, {"written": task})
    node = Node.make({"rule": "topk"}, "intermediate", "0.5", None)
    assert evaluate_node(session, node, tmp_path / "topk")["tasks"]["written"]["status"] == "ok"
    rows = pq.read_table(tmp_path / "topk/samples.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        zeros = row["prompt_zeros"]
        assert zeros == [row["prompt_tokens"] * WIDTH // 2] * LAYERS


def test_logits_of_the_last_token_are_those_of_the_class(folder: Path) -> None:
    model = load(Checkpoint(folder), device="cpu")
    ids = torch.arange(3, 27).reshape(2, 12)
    assert head.of_the_last(model) == {"logits_to_keep": 0}
    with torch.no_grad():
        cut = model(ids, logits_to_keep=1, use_cache=True).logits
        with head.shown_the_last(model):
            whole = model(ids, use_cache=True, **head.of_the_last(model)).logits
    torch.testing.assert_close(whole, cut)
    assert head.of_the_last(tiny_model("llama")) == {"logits_to_keep": 1}
