"""Prompts' masks behind the prompt: against plain loops, in any batch, and where they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model_parts import find_ffns
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.built_in.prompt_mask import PromptMask
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.studies import output_error
from sparsity_atlas.studies.continuation import continued
from sparsity_atlas.studies.prompt_reuse import HowToRun, prompt_rows, spans
from sparsity_atlas.studies.prompt_table import QUANTITIES, SCHEMA
from tiny_lm import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES, LENGTH, PROMPT, WIDTH, KEPT = 12, 14, 7, 24, 6
IDS = torch.randint(3, 50, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
ANOTHER = [(one + SEQUENCES // 2) % SEQUENCES for one in range(SEQUENCES)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Two layers, whose weights are so large that masks make a difference."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "vocab_size": 50,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.4)).eval()


def measured(model: LlamaForCausalLM, batch: int = 5, *continuations: str) -> list[dict[str, Any]]:
    how = HowToRun(continuations or ("given",), batch, 100, 0)
    criterion = create({"rule": "prompt_mask"})
    assert isinstance(criterion, PromptMask)
    level = str(KEPT / WIDTH)
    return list(
        prompt_rows(criterion, find_ffns(model), "intermediate", {}, [level, "1"], IDS, how)
    )


def picked(rows: list[dict[str, Any]], level: str, quantity: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["level"], row["quantity"]) == (level, quantity)]


def test_spans_by_hand() -> None:
    assert spans(1) == [(1, 1)]
    assert spans(7) == [(1, 1), (2, 3), (4, 7), (1, 7)]
    assert spans(10) == [(1, 1), (2, 3), (4, 7), (8, 10), (1, 10)]
    assert spans(0) == []


def vectors(model: LlamaForCausalLM, layer: int) -> Tensor:
    """What the down projection of a layer reads, in float64."""
    seen: list[Tensor] = []
    down = model.model.layers[layer].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].double()


def largest(scores: Tensor) -> set[int]:
    return set(scores.argsort(descending=True)[:KEPT].tolist())


def prompt_sets(values: Tensor) -> list[set[int]]:
    """Of each sequence the neurons with the largest share of the prompt's vectors' squares."""
    found = []
    for row in values[:, :PROMPT]:
        share = torch.zeros(WIDTH, dtype=torch.float64)
        for token in row:
            share += token**2 / (token**2).sum()
        found.append(largest(share))
    return found


def test_overlaps_against_sets(model: LlamaForCausalLM) -> None:
    rows = measured(model)
    for layer in range(2):
        values = vectors(model, layer)
        prompts = prompt_sets(values)
        for first, last in spans(LENGTH - PROMPT):
            for quantity, whose in (
                ("overlap", range(SEQUENCES)),
                ("overlap_another", ANOTHER),
            ):
                shares = [
                    len(largest(values[one, PROMPT - 1 + distance].abs()) & prompts[other]) / KEPT
                    for one, other in enumerate(whose)
                    for distance in range(first, last + 1)
                ]
                (row,) = (
                    row
                    for row in picked(rows, str(KEPT / WIDTH), quantity)
                    if (row["layer"], row["nearest"], row["farthest"]) == (layer, first, last)
                )
                assert row["value"] == pytest.approx(np.mean(shares), abs=1e-7)
                assert row["low"] <= row["value"] <= row["high"]
                assert row["chance"] == pytest.approx(KEPT / WIDTH)
    shares = [row["value"] for row in picked(rows, str(KEPT / WIDTH), "sparsity")]
    assert shares == [pytest.approx(1 - KEPT / WIDTH)] * 2


def nats(model: LlamaForCausalLM, keep: Any = None) -> np.ndarray:
    """Of the tokens behind the prompt; `keep` tells a layer's mask from its vectors."""

    def forward_of(layer: int, mlp: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            i = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            mask = torch.ones_like(i, dtype=torch.bool)
            for one in range(SEQUENCES):
                for token in range(PROMPT, LENGTH):
                    mask[one, token] = False
                    mask[one, token, sorted(keep(layer, one, i[one, token]))] = True
            return mlp.down_proj(torch.where(mask, i, 0))

        return forward

    mlps = [one.mlp for one in model.model.layers]
    own = [mlp.forward for mlp in mlps]
    for layer, mlp in enumerate(mlps):
        if keep is not None:
            mlp.forward = forward_of(layer, mlp)
    with torch.no_grad():
        logits = model(IDS).logits.double()
    for mlp, forward in zip(mlps, own, strict=True):
        mlp.forward = forward
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    return losses[:, PROMPT:].numpy()


def test_losses_against_a_model_that_is_masked_by_hand(model: LlamaForCausalLM) -> None:
    rows = measured(model)
    level = str(KEPT / WIDTH)
    sets = [prompt_sets(vectors(model, layer)) for layer in range(2)]
    dense = nats(model)
    added = {
        "added_by_reuse": nats(model, lambda layer, one, _: sets[layer][one]) - dense,
        "added_by_own": nats(model, lambda _, __, vector: largest(vector.abs())) - dense,
        "added_by_another": nats(model, lambda layer, one, _: sets[layer][ANOTHER[one]]) - dense,
    }
    wanted = {"loss": dense, **added}
    wanted["cost_of_reuse"] = added["added_by_reuse"] - added["added_by_own"]
    for quantity, each in wanted.items():
        found = picked(rows, level, quantity)
        assert [(row["nearest"], row["farthest"]) for row in found] == spans(LENGTH - PROMPT - 1)
        for row in found:
            mean = each[:, row["nearest"] - 1 : row["farthest"]].mean()
            assert row["value"] == pytest.approx(mean, abs=1e-5)
            assert row["low"] <= row["value"] <= row["high"]
            assert "layer" not in row
    assert abs(added["added_by_reuse"].mean() - added["added_by_own"].mean()) > 1e-3
    # Nothing is dropped at the dense level.
    for quantity in ("added_by_reuse", "added_by_own", "added_by_another", "cost_of_reuse"):
        assert {row["value"] for row in picked(rows, "1", quantity)} == {0}


def test_batches_change_nothing(model: LlamaForCausalLM) -> None:
    one, many = (measured(model, batch, "given", "generated") for batch in (1, 12))
    assert len(one) == len(many)
    for row, other in zip(one, many, strict=True):
        assert {name: row[name] for name in ("continuation", "quantity", "nearest")} == {
            name: other[name] for name in ("continuation", "quantity", "nearest")
        }
        assert row["value"] == pytest.approx(other["value"], abs=1e-5)


def test_what_a_model_writes(model: LlamaForCausalLM) -> None:
    found = continued(model, IDS, PROMPT, 5, 0)
    assert torch.equal(found[:, :PROMPT], IDS[:, :PROMPT])
    assert torch.equal(found, continued(model, IDS, PROMPT, 12, 0))
    assert not torch.equal(found, continued(model, IDS, PROMPT, 12, 1))
    assert not (found[:, PROMPT:] == 2).any()  # the end token
    # Draws of the model's own distribution: its tokens are likelier than any that are given.
    with torch.no_grad():
        chosen = model(found).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        likely = chosen.gather(-1, found[:, PROMPT:, None]).mean()
        given = model(IDS).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    assert likely > given.gather(-1, IDS[:, PROMPT:, None]).mean() + 1


def test_one_sequence_has_neither_interval_nor_another(model: LlamaForCausalLM) -> None:
    criterion = create({"rule": "prompt_mask"})
    assert isinstance(criterion, PromptMask)
    rows = prompt_rows(
        criterion, find_ffns(model), "gate", {}, ["0.5"], IDS[:1], HowToRun(("given",), 4, 100, 0)
    )
    found = list(rows)
    assert {row["quantity"] for row in found} == set(QUANTITIES) - {
        "overlap_another",
        "added_by_another",
    }
    assert all(row["low"] is None and row["value"] is not None for row in found)


@pytest.mark.parametrize(
    ("rule", "asked"), [("prompt_mask", True), ("prompt_mask", False), ("topk", True)]
)
def test_the_stage_writes_what_is_asked_for(
    captured: Path, manifest: Path, tmp_path: Path, rule: str, asked: bool
) -> None:
    studies = {"prompt_reuse": ["given"], "batch_size": 4, "replicates": 100, "seed": 0}
    settings = {"dtype": "auto", "device": "cpu", **(studies if asked else {})}
    run_stage(
        output_error,
        {
            **{"--model": manifest, "--site": "gate", "--levels": "0.5"},
            **{"--store": captured / "activations.zarr", "--calibration": ""},
            **{"--criterion": json.dumps({"rule": rule}), "--settings": json.dumps(settings)},
            "--output": tmp_path / "sparsity.parquet",
        },
    )
    rows = read_parquet(tmp_path / "prompt_reuse.parquet", SCHEMA).to_pylist()
    there = rule == "prompt_mask" and asked
    assert {row["quantity"] for row in rows} == (set(QUANTITIES) if there else set())
