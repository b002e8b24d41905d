"""Text that a masked-diffusion model writes for lm-eval: its words, its ends, what each pass announces."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from masked_diffusion import MASK, logits_by_hand, save_diffusion
from sparsity_atlas.config.model_entry import DiffusionSettings
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.expert_table import NAME
from sparsity_atlas.evaluation.expert_table import read_table as read_experts
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.lm.masked.denoising_options import options_of
from sparsity_atlas.sparsify.attach import Counter
from tiny_lm import (
    CHOICE,
    GENERATION,
    MAX_LENGTH,
    choice_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NODE = Node.make({"rule": "topp"}, "intermediate", "0.8")
LENGTH, STEPS, BLOCK = 9, 5, 4
# Blocks of four, four and one token in three, one and one steps.
PLAN = [(0, 4, (2, 1, 1)), (4, 8, (4,)), (8, 9, (1,))]
STOPS = ["s", "Q", "zz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion") / "m")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> dict[str, dict[str, Any]]:
    options = {"until": STOPS, "max_gen_toks": LENGTH, "steps": STEPS, "do_sample": False}
    return {
        "words": write_task(
            folder.parent / "tasks",
            "words",
            rolling_documents(9, 4),
            **{**GENERATION, "generation_kwargs": options},
        )
    }


@pytest.fixture(scope="module")
def session(folder: Path, tasks: dict) -> Session:
    manifest = write_model_manifest(folder, folder.parent / "model.json")
    return open_session(manifest, tasks, diffusion={"block_length": BLOCK})


def written(session: Session, folder: Path, prompt: list[int]) -> tuple[list[int], list[list[int]]]:
    """Tokens that are filled in, one row by itself, and what the model was shown in each step."""
    tokens, seen = [*prompt, *[MASK] * LENGTH], []
    ends = {session.lm.tokenizer.eos_token_id}
    for start, end, counts in PLAN:
        inside = range(len(prompt) + start, len(prompt) + end)
        for count in counts:
            seen.append(list(tokens))
            logits = logits_by_hand(folder, torch.tensor([tokens]))[0].double()
            logits[:, MASK] = -torch.inf
            likely, token = logits.softmax(-1).max(-1)
            masked = [place for place in inside if tokens[place] == MASK]
            for place in sorted(masked, key=lambda p: (-likely[p].item(), p))[:count]:
                tokens[place] = int(token[place])
        found = tokens[len(prompt) : len(prompt) + end]
        text = session.lm.tokenizer.decode(found, skip_special_tokens=True)
        if ends & set(found) or any(stop in text for stop in STOPS):
            break
    return found, seen


def test_texts_are_those_of_a_loop_over_one_row(
    session: Session, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[tuple[Any, ...]] = []
    original = Counter.expect

    def expect(self: Counter, valid: Any, phase: Any, *more: Any, step: Any) -> None:
        announced.append((phase, valid.clone(), step))
        original(self, valid, phase, *more, step=step)

    monkeypatch.setattr(Counter, "expect", expect)
    evaluate_node(session, None, tmp_path)
    prepared = session.prepared("words")
    work, instances = prepared.work, prepared.leaves["words"].instances
    rows = read_table(tmp_path / "samples.parquet")[1].to_pylist()
    lengths, early = [], 0
    for number, (instance, row) in enumerate(zip(instances, rows, strict=True)):
        asked = work.asked[number]
        prompt = asked[-(MAX_LENGTH - LENGTH) :]
        tokens, seen = written(session, folder, prompt)
        ends = [i for i, token in enumerate(tokens) if token == 2]
        text = session.lm.tokenizer.decode(tokens[: (ends or [None])[0]], skip_special_tokens=True)
        for stop in STOPS:
            text = text.split(stop)[0]
        assert instance.resps == [text]
        assert row["denoising_tokens"] == len(seen) * (len(prompt) + LENGTH)
        assert row["unique_tokens"] == row["denoising_tokens"]
        assert row["scoring_tokens"] == 0
        said = session.lm.tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["unfinished"] == (not ends and not any(stop in said for stop in STOPS))
        assert row["cut_tokens"] == len(asked) - len(prompt)
        lengths.append(len(seen))
        early += len(seen) < STEPS
    # Some are finished before the last block; and some prompts are too long.
    assert 0 < early < len(rows)
    assert any(row["cut_tokens"] for row in rows)
    assert 0 < sum(row["unfinished"] for row in rows) < len(rows)
    # Batches one after the other; in each a pass for every step, over the rows that go on.
    batches = iter(work.prompts)
    for phase, valid, step in announced:
        if step.number == 0:
            batch = next(batches)
        own = [batch[row] for row in step.rows]
        assert own == [one for one in batch if lengths[one] > step.number]
        assert phase == "denoising"
        assert not step.guide
        prompts = [min(work.lengths[one], MAX_LENGTH - LENGTH) for one in own]
        assert step.prompt.sum(1).tolist() == prompts
        assert valid.sum(1).tolist() == [one + LENGTH for one in prompts]
        filled = sum([count for *_, counts in PLAN for count in counts][: step.number])
        assert step.masked.sum(1).tolist() == [LENGTH - filled] * len(own)
        assert not (step.masked & step.prompt).any()


def test_experts_are_counted_in_both_phases(tmp_path: Path) -> None:
    experts, each = 6, 2
    folder = save_diffusion(
        tmp_path / "m",
        kind="olmoe",
        num_experts=experts,
        num_experts_per_tok=each,
        intermediate_size=16,
        num_key_value_heads=2,
    )
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    options = {"until": ["zz"], "max_gen_toks": 4, "steps": 2}
    own = {
        "choice": write_task(tmp_path / "tasks", "choice", choice_documents(4), **CHOICE),
        "words": write_task(
            tmp_path / "tasks",
            "words",
            rolling_documents(3, 4),
            **{**GENERATION, "generation_kwargs": options},
        ),
    }
    session = open_session(manifest, own, diffusion={"samples": 3, "guidance": 1.0})
    result = evaluate_node(session, NODE, tmp_path / "node")
    assert result["status"] == "ok"
    table = read_experts(tmp_path / "node" / NAME)
    rows = read_table(tmp_path / "node/samples.parquet")[1].to_pylist()
    for task, phase in (("choice", "scoring"), ("words", "denoising")):
        counted = table.rows[task].to_pylist()
        assert {one["phase"] for one in counted} == {phase}
        samples = [row for row in rows if row["task"] == task]
        tokens = sum(row[f"{phase}_tokens"] for row in samples)
        assert tokens > 0
        for layer in (0, 1):
            here = [one for one in counted if one["layer"] == layer]
            assert sum(one["tokens"] for one in here) == each * tokens
            zeros = sum(row[f"{phase}_zeros"][layer] for row in samples)
            assert sum(one["zeros"] for one in here) == zeros > 0
            for name in ("tokens", "zeros", "entries"):
                assert [one[name] for one in here] == [one[f"unique_{name}"] for one in here]


def options(given: dict[str, Any], **settings: Any) -> Any:
    request: Any = SimpleNamespace(args=("?", given), task_name="words", doc_id=0)
    return options_of(request, DiffusionSettings(**settings), 48, 40)


def test_a_task_outweighs_the_model_s_entry() -> None:
    found = options({"until": "x"}, steps=64, block_length=8, remasking="random")
    assert (found.schedule.length, found.schedule.steps, found.schedule.block_length) == (40, 40, 8)
    assert (found.remasking, found.stops) == ("random", ["x"])
    given = {"max_gen_toks": 12, "steps": 4, "block_length": 6, "remasking": "low_confidence"}
    found = options({**given, "temperature": 0.0, "top_p": 1.0}, steps=64, remasking="random")
    assert (found.schedule.length, found.schedule.steps, found.schedule.block_length) == (12, 4, 6)
    assert found.remasking == "low_confidence"
    assert options({}).schedule.steps == 40


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"do_sample": True}, "do_sample: True found, .* the likeliest tokens only"),
        ({"temperature": 0.5}, "do_sample: True found"),
        ({"num_beams": 4}, "num_beams: 4 found, .* leave it out"),
        ({"penalty_alpha": 0.6}, "penalty_alpha: 0.6 found, .* takes until, max_gen_toks, steps"),
        ({"max_gen_toks": 48}, "max_gen_toks: 48 found, .* takes 1 to 47"),
        ({"max_gen_toks": 0}, "max_gen_toks: 0 found"),
        ({"steps": "many"}, "steps: 'many' found, .* a whole number from 1 on"),
        ({"block_length": 0}, "block_length: 0 found"),
        ({"remasking": "best"}, "remasking: 'best' found, .* low_confidence or random"),
        ({"until": [3]}, r"until: \[3\] found, .* a text or a list of texts"),
        ({"steps": 2, "block_length": 4}, "steps: 2 found; 40 tokens in blocks of 4 take 10 to 40"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskFailure, match=f"'words': .*{said}"):
        options(given)


def test_a_task_that_is_refused_is_a_result(
    folder: Path, tasks: dict, tmp_path: Path, session: Session
) -> None:
    own = {"words": {**tasks["words"], "override": {"generation_kwargs": {"do_sample": True}}}}
    manifest = folder.parent / "model.json"
    result = evaluate_node(open_session(manifest, own), None, tmp_path)["tasks"]["words"]
    assert result["status"] == "failed"
    assert "do_sample" in result["reason"]


def test_a_causal_model_is_not_asked_with_masks(
    manifest: Path, tasks: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(AtlasError, match=r"^models\.\w+: diffusion: .* causal; leave it out"):
        open_session(manifest, tasks, diffusion={"samples": 3})
