"""A part of the prompt that stays dense: against hooks by hand, in counts, and over batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsity_atlas.criteria import create, dense_prompt
from sparsity_atlas.criteria.dense_prompt import DensePrompt
from sparsity_atlas.criteria.in_experts import why_not
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table, zeros_in
from sparsity_atlas.sparsify.attach import Counter
from sparsity_atlas.sparsify.sparing import left_dense
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    write_model_manifest,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = {"rule": "topk", "dense_prompt": 0.5}
SITE, LEVEL = "intermediate", "0.25"


@pytest.fixture(scope="module")
def model_json(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_manifest(model_folder, tmp_path_factory.mktemp("model") / "model.json")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "choice": write_task(folder, "choice", choice_documents(6), **CHOICE),
        "pages": write_task(folder, "pages", rolling_documents(3), **ROLLING),
        "text": write_task(folder, "text", rolling_documents(4, 4), **GENERATION),
    }


@pytest.fixture(scope="module")
def session(model_json: Path, tasks: dict[str, Any]) -> Session:
    return open_session(model_json, tasks)


@pytest.mark.parametrize(
    ("dense", "lengths", "expected"),
    [
        (
            DensePrompt(share=dense_prompt.read("t", {"dense_prompt": 0.5}).share),
            (7, 4, 1),
            (3, 2, 0),
        ),
        (
            DensePrompt(share=dense_prompt.read("t", {"dense_prompt": 0.29}).share),
            (100, 7, 3),
            (29, 2, 0),
        ),
        (DensePrompt(tokens=3), (7, 3, 2), (3, 3, 2)),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_tokens_of_each_sequence_stay(
    dense: DensePrompt, lengths: tuple[int, ...], expected: tuple[int, ...], side: str
) -> None:
    longest = max(lengths)
    valid = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        valid[row, slice(longest - length, None) if side == "left" else slice(length)] = True
    found = left_dense(dense, valid)
    for row, (length, count) in enumerate(zip(lengths, expected, strict=True)):
        first = longest - length if side == "left" else 0
        assert found[row].nonzero().flatten().tolist() == list(range(first, first + count))


def run(session: Session, node: Node | None, ids: Tensor, valid: Tensor, phase: Any) -> Tensor:
    model: Any = session.lm.model
    with torch.no_grad(), session.attach(node) as counter:
        counter.expect(valid, phase)
        out = model(ids, attention_mask=valid.long(), use_cache=False).logits
        assert isinstance(counter, Counter)
        counter.take()
    return out


@pytest.mark.parametrize("phase", ["scoring", "prompt"])
@pytest.mark.parametrize("criterion", [HALF, {"rule": "topk", "dense_tokens": 2}])
def test_the_rest_is_what_hooks_by_hand_give(
    session: Session, criterion: dict[str, Any], phase: str
) -> None:
    """Sequences of seven and of four tokens, padded on the left."""
    ids = torch.randint(3, 290, (2, 7), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :3] = False
    stays = (3, 2) if "dense_prompt" in criterion else (2, 2)

    def hook(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        out = x.clone()
        for row, first in ((0, 0), (1, 3)):
            for token in range(first + stays[row], 7):
                vector = x[row, token].double().abs()
                dropped = vector.argsort()[: len(vector) - len(vector) // 4]
                out[row, token, dropped] = 0
        return out

    found = run(session, Node.make(criterion, SITE, LEVEL), ids, valid, phase)
    model: Any = session.lm.model
    handles = [layer.mlp.down_proj.register_forward_pre_hook(hook) for layer in model.model.layers]
    try:
        expected = run(session, None, ids, valid, phase)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(found[valid], expected[valid])
    whole = run(session, Node.make({"rule": "topk"}, SITE, LEVEL), ids, valid, phase)
    assert not torch.equal(found[valid], whole[valid])


def test_zeros_are_counted_over_all_tokens(session: Session, tmp_path: Path) -> None:
    """SiLU has no zeros of its own: those that there are stand behind each prompt's first half."""
    evaluate_node(session, Node.make(HALF, SITE, LEVEL), tmp_path)
    header, table = read_table(tmp_path / "samples.parquet")
    slots = len(header["slots"])
    width = header["slots"][0][2]
    dropped = width - width // 4
    rows = table.filter([task == "text" for task in table["task"].to_pylist()])
    prompts = rows["prompt_tokens"].to_numpy()
    expected = (prompts - prompts // 2) * dropped
    assert zeros_in(rows, "prompt", slots).tolist() == [[count] * slots for count in expected]
    generated = rows["generation_tokens"].to_numpy() * dropped
    assert zeros_in(rows, "generation", slots).tolist() == [[count] * slots for count in generated]
    assert generated.sum() > 0


def test_batches_change_nothing(model_json: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        session = open_session(model_json, tasks, batch_size=size)
        evaluate_node(session, Node.make(HALF, SITE, LEVEL), tmp_path / str(size))
        found.append(read_table(tmp_path / str(size) / "samples.parquet")[1])
    for column in found[0].column_names:
        one, four = (table[column].to_pylist() for table in found)
        if column == "nats":
            np.testing.assert_allclose(one, four, rtol=1e-5)
        elif column != "metrics":
            assert one == four, column


def test_a_share_of_almost_nothing_is_none(session: Session, tmp_path: Path) -> None:
    """Which of no prompt is a token: the same bytes as without, but for what names the rule."""
    rules = ({"rule": "topk"}, {"rule": "topk", "dense_prompt": 0.001})
    tables = []
    for number, rule in enumerate(rules):
        evaluate_node(session, Node.make(rule, SITE, LEVEL), tmp_path / str(number))
        tables.append(read_table(tmp_path / str(number) / "samples.parquet")[1])
    assert tables[0].select(["generation_zeros", "prompt_zeros", "scoring_zeros"]) == tables[
        1
    ].select(["generation_zeros", "prompt_zeros", "scoring_zeros"])
    first, second = (Node.make(rule, SITE, LEVEL).identity() for rule in rules)
    assert first != second


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dense_prompt": 1}, "dense_prompt: expected a number between 0 and 1, found 1$"),
        ({"dense_prompt": "half"}, "dense_prompt: expected a number between 0 and 1, found 'half'"),
        ({"dense_prompt": True}, "dense_prompt: expected a number between 0 and 1, found True"),
        ({"dense_tokens": 0}, "dense_tokens: expected a whole number of at least 1, found 0"),
        ({"dense_tokens": 1.5}, "dense_tokens: expected a whole number of at least 1, found 1.5"),
        ({"dense_tokens": 1, "dense_prompt": 0.5}, "give either dense_prompt or dense_tokens"),
    ],
)
def test_bad_keys_are_told_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=f"^criteria: topk: {message}"):
        create({"rule": "topk", **keys})


def test_where_it_cannot_work() -> None:
    with pytest.raises(AtlasError, match="prompt_mask: dense_prompt: this rule looks at prompts"):
        create({"rule": "prompt_mask", "dense_prompt": 0.5})
    constants = {"not_in_experts": "", "by_channel": False}
    assert why_not(constants, {"dense_tokens": 4}) == (
        "what stays dense of a prompt are tokens, of which an expert sees some"
    )
    assert why_not(constants, {}) is None


def test_a_diffusion_model_is_refused(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(session.lm), "denoises", True)
    with pytest.raises(AtlasError, match="dense_prompt: a masked-diffusion model runs its prompt"):
        evaluate_node(session, Node.make(HALF, SITE, LEVEL), tmp_path)
