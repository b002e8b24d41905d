"""Criteria that take a prompt's mask for what follows it: prompt and what follows told apart."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_parts import find_ffns
from sparsity_atlas import kernels
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.built_in.prompt_mask import PromptMask
from sparsity_atlas.criteria.error_table import ErrorTable
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.samples import read_table
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.lm.forward import Abilities
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.studies.sparse_output import Output, sparse_output
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    open_session,
    rolling_documents,
    save_model,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)
from tiny_models import WIDTH, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def mask(values: Tensor, level: float, phase: str = "scoring", **parameters: float) -> Tensor:
    criterion = create({"rule": "prompt_mask", **parameters})
    valid = torch.ones(values.shape[:2], dtype=torch.bool)
    return criterion.mask_sequences(values, valid, phase, level)


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("seed", [1, 50, 1000, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_by_every_path(
    monkeypatch: pytest.MonkeyPatch, path: str, seed: int, dtype: torch.dtype
) -> None:
    """The masks of all of it at once, in float64: with ties, rows of zeros, and padding that is NaN."""
    values = torch.randn(3, 40, 67, generator=torch.manual_seed(seed)).round(decimals=1).to(dtype)
    values[0, 3], values[1, 9:] = 0, torch.nan
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, 9:] = False
    whole = values.double()
    shares = (whole / whole.norm(dim=-1, keepdim=True)).nan_to_num(0)
    sums = (shares * valid[..., None]).square().sum(1)
    monkeypatch.setenv(kernels.VARIABLE, path)
    for level in (0.1, 0.5, 0.9):
        least = sums.sort(-1).values[:, -int(level * 67), None]
        found = PromptMask().neurons(values, valid, level)
        assert torch.equal(found, sums >= least)


def test_by_hand() -> None:
    # Normed, the prompt's two vectors are (0.6, 0.8, 0) and (0, 0.6, 0.8): sums of squares
    # 0.36, 1 and 0.64. The large third token is no part of the prompt.
    values = torch.tensor([[[3.0, 4, 0], [0, 60, -80], [9e9, 0, 0], [1, 1, 1]]])
    kept = [[True] * 3, [True] * 3, [False, True, False], [False, True, False]]
    assert mask(values, 0.4)[0].tolist() == kept
    kept[2:] = [[False, True, True]] * 2
    assert mask(values, 0.7)[0].tolist() == kept
    kept[1] = kept[2] = kept[3] = [False, True, False]
    # A quarter of four tokens: the first alone is the prompt.
    assert mask(values, 0.4, prompt_share=0.25)[0].tolist() == kept


@pytest.mark.parametrize(("share", "length"), [(0.6, 25), (0.07, 100), (0.5, 7), (0.001, 9)])
def test_a_prompt_has_exactly_its_share(share: float, length: int) -> None:
    criterion = create({"rule": "prompt_mask", "prompt_share": share})
    values, valid = torch.ones(1, length, 4), torch.ones(1, length, dtype=torch.bool)
    dense = criterion.mask_sequences(values, valid, "scoring", 0.0)[0].all(-1)
    assert int(dense.sum()) == math.ceil(Fraction(str(share)) * length)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10), st.sampled_from((0.2, 0.5, 0.9)))
def test_against_float64(seed: int, tenths: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 7, 10, generator=draw)
    lengths = torch.randint(1, 8, (3,), generator=draw)
    valid = torch.arange(7) < lengths[:, None]
    values[~valid] = 1e6  # padding must not count
    criterion = create({"rule": "prompt_mask", "prompt_share": share})
    found = criterion.mask_sequences(values, valid, "scoring", tenths / 10)
    for row, length, keep in zip(values.double(), lengths.tolist(), found, strict=True):
        prompt = math.ceil(Fraction(str(share)) * length)
        unit = row[:prompt] / row[:prompt].norm(dim=1, keepdim=True)
        best = unit.square().sum(0).argsort(descending=True)[:tenths]
        wanted = torch.zeros(10, dtype=torch.bool)
        wanted[best] = True
        assert keep[:prompt].all()
        assert torch.equal(keep[prompt:length], wanted.expand(length - prompt, 10))


def test_the_prompt_s_mask_is_reused_in_generation() -> None:
    criterion = create({"rule": "prompt_mask"})
    prompt, new = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])  # padded on the left
    assert criterion.mask_sequences(prompt, valid, "prompt", 0.5).all()
    first = criterion.mask_sequences(new, valid[:, :1], "generation", 0.5)
    later = criterion.mask_sequences(torch.randn(2, 1, 8), valid[:, :1], "generation", 0.5)
    assert torch.equal(first, later)
    for row, start in ((0, 2), (1, 0)):
        unit = prompt[row, start:] / prompt[row, start:].norm(dim=1, keepdim=True)
        best = unit.square().sum(0).argsort(descending=True)[:4]
        assert first[row, 0].nonzero().flatten().tolist() == sorted(best.tolist())


def proportional(factor: float) -> dict[str, Tensor]:
    """A calibration in which ε is this factor times the level."""
    error = np.array([0, 1e-5, 1])
    return ErrorTable(error, factor * error, np.array([True, False, True])).state()


def test_own_masks_have_the_size_of_the_prompt_s() -> None:
    """See `test_by_hand`: the prompt leaves one neuron of three, or two; ties are kept."""
    values = torch.tensor([[[3.0, 4, 0], [0, 60, -80], [-9, 0, 3], [1, 1, 2]]])
    kept = [[True] * 3, [True] * 3, [True, False, False], [False, False, True]]
    assert mask(values, 0.4, after="own")[0].tolist() == kept
    kept[2:] = [[True, False, True], [True, True, True]]
    assert mask(values, 0.7, after="own")[0].tolist() == kept
    assert not mask(values, 0.0, after="own")[0][2:].any()
    assert mask(values, 1.0, after="own").all()


def test_own_masks_in_generation_keep_that_size() -> None:
    criterion = create({"rule": "prompt_mask", "after": "own"})
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert criterion.mask_sequences(torch.randn(2, 5, 8), valid, "prompt", 0.25).all()
    new = torch.tensor([[1.0, 5, 0, 0, 0, 0, -6, 0], [0.0, 0, 3, 0, 0, 2, 1, 0]])[:, None]
    found = criterion.mask_sequences(new, valid[:, :1], "generation", 0.25)
    assert [row.nonzero()[:, 1].tolist() for row in found] == [[1, 6], [2, 5]]


@pytest.mark.parametrize("after", ["others", None, 1])
def test_bad_after(after: object) -> None:
    with pytest.raises(AtlasError, match="prompt_mask: after: expected prompt or own, found"):
        create({"rule": "prompt_mask", "after": after})


def test_tda_s_own_masks_are_of_what_neurons_add() -> None:
    class Place3:
        layer, tensor = 0, "intermediate"

        def column_norms(self) -> Tensor:
            return torch.tensor([1.0, 2, 3])

    bound = create({"rule": "tda", "after": "own"}).bind(Place3(), proportional(10))
    # As in the test below two neurons remain, and later tokens' outputs are (7, 14, 3) and (4, 2, 3).
    values = torch.tensor([[[5.0, 3, 1], [0, 3, 1], [7, 7, 1], [-4, 1, 1]]])
    found = bound.mask_sequences(values, torch.ones(1, 4, dtype=torch.bool), "scoring", 0.35)[0]
    assert found[2:].tolist() == [[True, True, False], [True, False, True]]


def test_tda_by_hand() -> None:
    """Over the prompt, the root of the mean square of a neuron's output must reach ε."""

    class Place3:
        layer, tensor = 0, "intermediate"

        def column_norms(self) -> Tensor:
            return torch.tensor([1.0, 2, 3])

    bound = create({"rule": "tda"}).bind(Place3(), proportional(10))
    # Outputs in the prompt: 5 and 0, 6 and 6, 3 and 3; their means are √12.5 = 3.54, 6 and 3.
    values = torch.tensor([[[5.0, 3, 1], [0, 3, 1], [7, 7, 7], [7, 7, 7]]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    for level, kept in ((0.35, [True, True, False]), (0.36, [False, True, False])):
        found = bound.mask_sequences(values, valid, "scoring", level)[0]
        assert found[:2].all()
        assert found[2:].tolist() == [kept] * 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9999))
def test_tda_against_float64(seed: int, step: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    norms = torch.rand(12, generator=draw) + 0.1

    class Place12:
        layer, tensor = 0, "intermediate"

        def column_norms(self) -> Tensor:
            return norms

    bound = create({"rule": "tda"}).bind(Place12(), proportional(3))
    values = torch.randn(2, 9, 12, generator=draw)
    valid = torch.ones(2, 9, dtype=torch.bool)
    found = bound.mask_sequences(values, valid, "scoring", step / 10_000)
    assert found[:, :5].all()  # five of nine are the prompt
    rms = values[:, :5].double().square().mean(1).sqrt() * norms.double()
    wanted = rms >= 3 * step / 10_000
    clear = (rms - 3 * step / 10_000).abs() > 1e-5
    for later in found[:, 5:].unbind(1):
        assert torch.equal(later[clear], wanted[clear])


@pytest.mark.parametrize("share", [0, 1, -0.5, True, "half"])
def test_bad_prompt_share(share: object) -> None:
    with pytest.raises(AtlasError, match="prompt_mask: prompt_share: expected a number between"):
        create({"rule": "prompt_mask", "prompt_share": share})


# In a model


def test_each_layer_remembers_its_own_neurons() -> None:
    model = tiny_model("llama")
    ffns = find_ffns(model)
    seen: dict[int, Tensor] = {}
    ids = token_ids(tokens=6)
    with (
        torch.no_grad(),
        sparsified(model, ffns, "intermediate", create({"rule": "prompt_mask"}), 0.25) as counter,
    ):
        for ffn in ffns:
            ffn.down.module.register_forward_pre_hook(
                lambda module, args, layer=ffn.layer: seen.update({layer: args[0]})
            )
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        model(ids)
        zeros, _ = counter.take()
    kept = [seen[ffn.layer][:, 3:] != 0 for ffn in ffns]
    for one in kept:
        assert torch.equal(one, one[:, :1].expand(one.shape))
        assert int(one[:, 0].sum(-1).max()) == WIDTH // 4
    assert not torch.equal(kept[0], kept[1])
    # Three tokens of six are dense.
    assert zeros.sum(-1).tolist() == [[3 * (WIDTH - WIDTH // 4)] * 2] * len(ffns)


def test_the_prompt_is_dense_and_generation_sparse(manifest: Path, tmp_path: Path) -> None:
    tasks = {"words": write_task(tmp_path / "t", "words", rolling_documents(9, 4), **GENERATION)}
    node = Node.make({"rule": "prompt_mask"}, "intermediate", "0.5")
    evaluate_node(open_session(manifest, tasks), node, tmp_path / "node")
    _, table = read_table(tmp_path / "node" / "samples.parquet")
    rows = table.to_pylist()
    assert any(row["generation_tokens"] for row in rows)
    for row in rows:
        assert set(row["prompt_zeros"]) == {0}
        assert set(row["generation_zeros"]) == {20 * row["generation_tokens"]}  # of 40 neurons


def test_batches_change_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    manifest = write_model_manifest(folder, tmp_path / "model.json")
    tasks = {
        "pages": write_task(tmp_path / "t", "pages", rolling_documents(), **ROLLING),
        "words": write_task(tmp_path / "t", "words", rolling_documents(9, 4), **GENERATION),
    }
    node = Node.make({"rule": "prompt_mask"}, "intermediate", "0.3")
    tables = []
    for batch in (1, 5):
        session = open_session(manifest, tasks, batch_size=batch)
        evaluate_node(session, node, tmp_path / str(batch))
        tables.append(read_table(tmp_path / str(batch) / "samples.parquet")[1])
    one, five = (table.to_pylist() for table in tables)
    for left, right in zip(one, five, strict=True):
        for phase in ("scoring", "prompt", "generation"):
            assert left[f"{phase}_zeros"] == right[f"{phase}_zeros"]
        assert left["nats"] == pytest.approx(right["nats"], abs=1e-3)


def test_options_of_a_question_do_not_share_their_row(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option has a prompt of its own, half of question and option; rows that branch have none."""
    tasks = {"choice": write_task(tmp_path / "t", "choice", choice_documents(), **CHOICE)}
    node = Node.make({"rule": "prompt_mask"}, "intermediate", "0.3")
    session = open_session(manifest, tasks)
    evaluate_node(session, None, tmp_path / "dense")  # this one shares
    assert session.prepared("choice").work.abilities.branches
    evaluate_node(session, node, tmp_path / "node")
    # And what shares goes on as before.
    evaluate_node(session, None, tmp_path / "again")
    manifests = [read_manifest(tmp_path / name / "eval.json") for name in ("dense", "again")]
    assert manifests[0] == manifests[1]
    monkeypatch.setattr("sparsity_atlas.lm.model.abilities", lambda *_, **__: (Abilities(), {}))
    evaluate_node(open_session(manifest, tasks), node, tmp_path / "alone")
    tables = [read_table(tmp_path / name / "samples.parquet")[1] for name in ("node", "alone")]
    for left, right in zip(*(table.to_pylist() for table in tables), strict=True):
        assert left["scoring_zeros"] == right["scoring_zeros"]
        assert left["nats"] == pytest.approx(right["nats"], abs=1e-4)


def test_the_output_error_sees_whole_sequences() -> None:
    ffn = find_ffns(tiny_model("llama"))[0]
    rules = bind_all(create({"rule": "prompt_mask"}), [ffn], "gate")
    x = torch.randn(3 * 4, ffn.hidden)
    with torch.no_grad():
        output, zeros, entries = sparse_output(Output(ffn, "gate"), {"input": x}, rules, 0.25, 4)
        u, g = ffn.factors(x)
        keep = mask(g.view(3, 4, WIDTH), 0.25).view(12, WIDTH)
        wanted = ffn.down(torch.where(keep, u * g, 0))
    torch.testing.assert_close(output, wanted)
    assert (zeros, entries) == (3 * 2 * (WIDTH - WIDTH // 4), 12 * WIDTH)
    assert Place(ffn, "gate").width == WIDTH
    assert tiny_tokenizer().pad_token_id == 0
