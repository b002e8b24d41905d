"""Predictors of masks: their maps against numpy's, and what they can and cannot know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model_parts import find_ffns
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.studies.mask_predictors import (
    PREDICTABLE,
    RIDGE,
    CutFFN,
    LowRank,
    Probe,
    Tally,
    _threshold,
    predictor_rows,
)
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def ffn() -> FFN:
    return find_ffns(tiny_model("llama"))[0]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_cut_map_is_the_nearest_of_its_rank() -> None:
    linear = torch.nn.Linear(6, 9)
    from sparsity_atlas.sites.projection import Projection

    x = drawn(5, 6)
    with torch.no_grad():
        cut = LowRank(Projection("", linear), 6, linear.weight)
        left, values, right = np.linalg.svd(linear.weight.numpy())
        for rank in (1, 3, 6):
            weight = (left[:, :rank] * values[:rank]) @ right[:rank]
            expected = x.numpy() @ weight.T + linear.bias.numpy()
            np.testing.assert_allclose(cut(x, rank).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("tensor", PREDICTABLE)
def test_of_full_rank_it_is_the_ffn(ffn: FFN, tensor: str) -> None:
    x = drawn(7, ffn.hidden)
    with torch.no_grad():
        whole = CutFFN(ffn)(x, tensor, ffn.hidden)
        assert torch.allclose(whole, ffn.recompute({"input": x}, tensor), atol=1e-5)


def test_a_probe_is_a_ridge_regression_of_reduced_rank() -> None:
    x = drawn(200, 5, seed=1) + 3
    kept = (x @ drawn(5, 8, seed=2) + drawn(200, 8, seed=3)) > 1
    probe = Probe()
    for rows in (slice(0, 80), slice(80, 200)):
        probe.add(x[rows], kept[rows])
    scores = probe.fit()
    wide, bits = x.double().numpy(), kept.double().numpy()
    centred = wide - wide.mean(0)
    gram = centred.T @ centred + RIDGE * (wide**2).sum(0).mean() * np.eye(5)
    slope = np.linalg.solve(gram, centred.T @ (bits - bits.mean(0)))
    # The nearest map of a rank, in the metric that the ridge gives: cut the SVD of gram^(1/2) times it.
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(values) @ vectors.T
    left, size, right = np.linalg.svd(root @ slope, full_matrices=False)
    for rank in (1, 2, 5):
        cut = np.linalg.solve(root, (left[:, :rank] * size[:rank]) @ right[:rank])
        expected = centred @ cut + bits.mean(0)
        np.testing.assert_allclose(scores(x, rank).numpy(), expected, atol=1e-8)


def test_what_is_counted_by_hand() -> None:
    tally = Tally()
    tally.add(
        torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])
    )
    tally.add(
        torch.tensor([[True, False, False, False]]), torch.tensor([[True, False, False, False]])
    )
    recall, predicted = tally.rows("probe", 4)
    assert (recall["quantity"], recall["at"]) == ("recall_by_probe", 4)
    assert (recall["value"], recall["independent"]) == (2 / 3, 3 / 8)
    assert (predicted["quantity"], predicted["value"]) == ("sparsity_by_probe", 5 / 8)


def stored(folder: Path, ffn: FFN, x: torch.Tensor, length: int) -> ActivationStore:
    """A store of one layer's input."""
    store = ActivationStore(folder / "store.zarr", writable=True)
    store.put_ids(np.zeros((len(x) // length, length), dtype=np.int64))
    store.create("input", {ffn.layer: (1, ffn.hidden, 0)}, len(x), length, "float32")
    store.put("input", ffn.layer, 0, x.numpy())
    return store


def numbers(ffn: FFN, store: ActivationStore, ranks: list[int], level: str = "0.25") -> dict:
    with torch.no_grad():
        rows = list(predictor_rows(ffn, store, "gate", TopK(), ranks, [level]))
    assert {row["level"] for row in rows} == {level}
    return {(row["quantity"], row["at"]): row["value"] for row in rows}


def test_inputs_of_few_directions_are_foretold_by_so_many(ffn: FFN, tmp_path: Path) -> None:
    """Along one direction masks are one of two, which a probe of rank 1 can tell apart."""
    x = drawn(512, 1, seed=4).sign() * drawn(1, ffn.hidden, seed=5)
    found = numbers(ffn, stored(tmp_path, ffn, x, 16), [1, ffn.hidden, ffn.hidden + 1])
    assert found["recall_by_weights", ffn.hidden] == 1
    assert found["recall_by_probe", 1] > 0.95
    assert found["sparsity_by_probe", 1] == pytest.approx(0.75, abs=0.05)
    assert not any(at > ffn.hidden for _, at in found)


def test_only_the_second_half_is_tried(ffn: FFN, tmp_path: Path) -> None:
    """A probe that has seen one direction knows nothing of another; the weights do."""
    first = drawn(256, 1, seed=4).sign() * drawn(1, ffn.hidden, seed=5)
    second = drawn(256, ffn.hidden, seed=6)
    store = stored(tmp_path, ffn, torch.cat([first, second]), 16)
    found = numbers(ffn, store, [ffn.hidden])
    assert found["recall_by_weights", ffn.hidden] == 1
    assert found["recall_by_probe", ffn.hidden] < 0.6


def test_one_sequence_is_too_few(ffn: FFN, tmp_path: Path) -> None:
    store = stored(tmp_path, ffn, drawn(16, ffn.hidden), 16)
    with pytest.raises(AtlasError, match="two captured sequences"):
        numbers(ffn, store, [1])


@pytest.mark.parametrize("dropped", [0, 1, 7, 299, 599, 600])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_that_of_the_sorted_scores(dropped: int, ties: bool) -> None:
    """Bit for bit, also among equal scores; where everything is dropped, above all of them."""
    values = drawn(20, 30, seed=dropped).double()
    if ties:
        values = values.round()
    kept = torch.ones(600, dtype=torch.bool)
    kept[:dropped] = False
    found = _threshold(lambda x, rank: x, 1, values, kept.view(20, 30))
    ordered = sorted(values.flatten().tolist())
    expected = ordered[dropped] if dropped < 600 else float("inf")
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.item() == expected
    if dropped < 600:
        assert int((values < found).sum()) <= dropped < int((values <= found).sum())
