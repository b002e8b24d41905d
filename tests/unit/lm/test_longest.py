"""Models that follow the longest sequence of a batch, or so far: what lm-eval's batches would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from interruptions import Interrupted, products, watch
from plain_lm import assert_same, through_atlas
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.lm.longest import Lengths, declared_lengths
from tiny_lm import (
    CHOICE,
    GENERATION,
    LAST_WORD,
    ROLLING,
    choice_documents,
    letter_documents,
    open_session,
    rolling_documents,
    save_model,
    sentences,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)
from tiny_models import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL, LONGEST = 32, 96
LONGROPE = {
    "max_position_embeddings": LONGEST,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0},
        **{"long_factor": [1.0, 2.0, 5.0, 9.0], "short_factor": [1.0, 1.0, 1.1, 1.2]},
        "original_max_position_embeddings": ORIGINAL,
    },
}
DYNAMIC = {
    "max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}
KINDS = {"longrope": ("phi3", LONGROPE), "dynamic": ("llama", DYNAMIC)}
NODE = Node.make({"rule": "topk"}, "intermediate", "0.5")


def build(name: str) -> Any:
    """A random model with one of these embeddings."""
    model_type, settings = KINDS[name]
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **settings,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model on disk."""
    found = {}
    for name in KINDS:
        found[name] = tmp_path_factory.mktemp("models") / name
        build(name).save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
        write_model_manifest(found[name], found[name].with_suffix(".json"))
    return found


def lengthen(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents with contexts on both sides of what the models were trained on, and beyond."""
    return [
        one | {"context": " ".join(sentences(1, i + 90, 2, 40))} for i, one in enumerate(documents)
    ]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tasks of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    letters = lengthen(letter_documents(8))
    tasks = {
        "choice": write_task(folder, "choice", lengthen(choice_documents(10)), **CHOICE),
        "rolling": write_task(folder, "rolling", rolling_documents(6), **ROLLING),
        "short": write_task(
            folder, "short", [one | {"context": "the old cat"} for one in letters], **CHOICE
        ),
    }
    write_task(folder, "letters", letters + letters[:3], **CHOICE)
    write_task(folder, "last", rolling_documents(9, 3), **LAST_WORD)
    write_task(folder, "words", rolling_documents(9, 4), **GENERATION)
    (folder / "mixed.yaml").write_text("group: mixed\ntask: [words, letters, last]\n")
    return {**tasks, "mixed": {"task": "mixed", "include": str(folder)}}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_lm_eval_s_batches(
    folders: dict[str, Path],
    catalogue: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    batch_size: int,
) -> None:
    session = open_session(
        folders[name].with_suffix(".json"), catalogue, batch_size=batch_size, max_length=LONGEST
    )
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    for task, entry in catalogue.items():
        lm = HFLM(
            # A model that has run nothing yet, as lm-eval's command loads it.
            pretrained=AutoModelForCausalLM.from_pretrained(folders[name]),
            tokenizer=session.lm.tokenizer,
            batch_size=batch_size,
            max_length=LONGEST,
        )
        manager = TaskManager(include_path=entry["include"], include_defaults=False)
        plain = evaluator.simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0
        )
        assert_same(outcomes[task], plain)
    results = json.loads((tmp_path / "dense" / "eval.json").read_text())["tasks"]
    batches = {task: result["batches"] for task, result in results.items()}
    assert batches == dict.fromkeys(catalogue, "lm_eval") | {"short": "plain"}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_cut_goes_on_in_the_state_it_had(
    folders: dict[str, Path], catalogue: dict, tmp_path: Path, name: str
) -> None:
    tasks = {task: catalogue[task] for task in ("mixed", "short")}
    manifest = folders[name].with_suffix(".json")
    session = open_session(manifest, tasks, max_length=LONGEST)
    calls = watch(session)
    evaluate_node(session, NODE, tmp_path / "whole")
    # Another node before it, in the same session.
    evaluate_node(session, None, tmp_path / "dense")
    evaluate_node(session, NODE, tmp_path / "again")
    assert products(tmp_path / "again") == products(tmp_path / "whole")
    count = len(calls) // 3
    for stop in range(1, count, 3):
        folder = tmp_path / f"stopped-{stop}"
        session = open_session(manifest, tasks, max_length=LONGEST)
        watch(session, stop)
        with pytest.raises(Interrupted):
            evaluate_node(session, NODE, folder)
        session = open_session(manifest, tasks, max_length=LONGEST)
        calls = watch(session)
        evaluate_node(session, NODE, folder)
        assert len(calls) == count - stop
        assert products(folder) == products(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_follows_is_found_and_left_as_it_was(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
    lengths = Lengths(model, LONGEST)
    assert not lengths.followed(list(range(5, 40)), ORIGINAL)
    assert lengths.followed(list(range(5, 40)), ORIGINAL + 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "falcon", "bloom", "rwkv"])
def test_other_models_do_not_follow(name: str) -> None:
    model = tiny_model(name, initializer_range=0.2)
    assert not _with_declared(model, 32).followed(list(range(5, 40)), 60)


def _with_declared(model: nn.Module, length: int) -> Lengths:
    model.config.seq_length = length
    return Lengths(model, 100)


def test_a_trace_that_no_module_keeps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies that follow the longest sequence, computed anew each time."""
    model = tiny_model("llama", initializer_range=0.2)
    rotary = model.model.rotary_emb
    inner = rotary.forward

    def following(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        scale = 1 + 0.5 * (position_ids.max() >= 32)
        return inner(x, position_ids.float() / scale)

    monkeypatch.setattr(rotary, "forward", following)
    assert _with_declared(model, 32).followed(list(range(5, 40)), 60)


OWN = """
import torch
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def forward(self, input_ids=None, **options):
        before = options.get("past_key_values")
        length = input_ids.shape[1] + (before.get_seq_length() if before is not None else 0)
        rotary = self.model.rotary_emb
        RULE
        return super().forward(input_ids, **options)
"""
# What a repository's code may do with lengths that no configuration names, and whether it matters.
OWN_RULES = {
    "by_the_pass": (
        "rotary.inv_freq = rotary.original_inv_freq / (3 if length > 40 else 1)",
        True,
    ),
    "by_the_longest_so_far": (
        "self.longest = max(length, getattr(self, 'longest', 0)); "
        "rotary.inv_freq = rotary.original_inv_freq / (1 + self.longest // 40)",
        True,
    ),
    "a_table_that_grows": (
        "self.table = torch.arange(max(length, len(getattr(self, 'table', []))))",
        False,
    ),
    "none": ("pass", False),
}


@pytest.mark.parametrize(("rule", "follows"), OWN_RULES.values(), ids=OWN_RULES)
def test_lengths_that_only_code_knows(
    tmp_path: Path, catalogue: dict, monkeypatch: pytest.MonkeyPatch, rule: str, follows: bool
) -> None:
    folder = save_model(tmp_path / "own", max_position_embeddings=LONGEST)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(OWN.replace("RULE", rule))
    manifest = write_model_manifest(folder, tmp_path / "own.json", trust_remote_code=True)
    session = open_session(manifest, {"choice": catalogue["choice"]})
    outcomes = through_atlas(session, None, tmp_path / "dense", monkeypatch)
    lm = HFLM(str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_path=catalogue["choice"]["include"], include_defaults=False)
    plain = evaluator.simple_evaluate(
        model=lm, tasks=["choice"], task_manager=manager, bootstrap_iters=0
    )
    assert_same(outcomes["choice"], plain)
    result = json.loads((tmp_path / "dense" / "eval.json").read_text())["tasks"]["choice"]
    assert (result["batches"] == "lm_eval") == follows


def test_a_state_that_cannot_be_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", initializer_range=0.2)
    rotary = model.model.rotary_emb
    inner, longest = rotary.forward, [0]

    def remembering(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        longest[0] = max(longest[0], int(position_ids.max()))
        return inner(x, position_ids.float() / (1 + 0.5 * (longest[0] >= 32)))

    monkeypatch.setattr(rotary, "forward", remembering)
    with pytest.raises(AtlasError, match="max_length: at most 32"):
        _with_declared(model, 32).followed(list(range(5, 40)), 60)


def test_lengths_that_a_configuration_declares() -> None:
    for name in ("phi3", "gpt2", "mpt", "llama"):
        model_type, settings = ARCHITECTURES[name]
        assert 64 in declared_lengths(AutoConfig.for_model(model_type, **settings).to_dict())
    nested = {"text_config": {"rope_parameters": {"original_max_position_embeddings": 4096}}}
    assert declared_lengths(nested | {"vocab_size": 900, "position_biased": True}) == {4096}
