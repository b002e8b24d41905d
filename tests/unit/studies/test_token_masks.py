"""Masks of a sequence's tokens: known ones by hand, drawn ones token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_parts import find_ffns
from sparsity_atlas.criteria.built_in.topk import TopK
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.sparsify.packed_bits import packed_by_torch
from sparsity_atlas.studies import token_masks
from sparsity_atlas.studies.mask_table import EXACT, QUANTITIES, SCHEMA
from sparsity_atlas.studies.sparse_output import Output, sparse_output
from sparsity_atlas.studies.token_masks import FREQUENCIES, MaskSums, MaskTables
from sparsity_atlas.terms import PlaceKey
from tiny_models import tiny_model

PLACE = PlaceKey(3, "ffn", "input")


def found(kept: np.ndarray, pieces: int = 1) -> dict[tuple[str, float], dict[str, float]]:
    """What is counted of masks [sequences, length, width], added in some pieces."""
    sums = MaskSums(kept.shape[1])
    for piece in np.array_split(kept, pieces):
        sums.add(torch.from_numpy(piece.copy()))
    return {(row["quantity"], row["at"]): row for row in sums.rows()}


def test_masks_known_by_hand() -> None:
    # Tokens keep {0}, {0, 1}, {}, {1} of four neurons, one after the other.
    kept = np.array([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]], dtype=bool)
    value = {key: row["value"] for key, row in found(kept).items()}
    assert value["unused", 1] == 12 / 16
    # Of two tokens {0, 1} and {1}; of all four {0, 1}.
    assert value["unused", 2] == (2 + 3) / 8
    assert value["unused", 4] == 1 / 2
    # Who keeps something behind another: {0, 1} has 0 of the one before, {1} nothing.
    assert value["reuse", 1] == (1 / 2 + 0) / 2
    assert value["jaccard", 1] == (1 / 2 + 0 + 0) / 3
    # Two apart: {} has nothing to keep again, {1} has 1 of {0, 1}.
    assert value["reuse", 2] == 1
    assert value["jaccard", 2] == (0 + 1 / 2) / 2
    assert value["sparsity", 0] == 3 / 4
    assert value["sparsity", 1] == 1 / 2
    assert value["sparsity", 2] == 7 / 8
    # Neurons are kept by 2, 2, 0 and 0 of 4 tokens.
    assert value["frequency", 0] == value["frequency", 0.25] == 1 / 2
    assert value["frequency", 0.5] == 1
    assert value["always", 1] == 0


def test_chance_by_hand() -> None:
    kept = np.array([[[1, 1], [1, 0]]], dtype=bool)  # Sparsity 1/4, frequencies 1 and 1/2.
    rows = found(kept)
    two = rows["unused", 2]
    assert (two["independent"], two["by_frequency"]) == (1 / 16, 1 / 8)
    reuse = rows["reuse", 1]
    assert (reuse["independent"], reuse["by_frequency"]) == (3 / 4, 1.25 / 1.5)
    jaccard = rows["jaccard", 1]
    assert jaccard["independent"] == pytest.approx(0.75 / 1.25)
    assert jaccard["by_frequency"] == pytest.approx((1 + 1 / 4) / (1 + 3 / 4))


def brute(kept: np.ndarray) -> dict[tuple[str, float], float | None]:
    """The same by sets, token by token."""
    sequences, length, width = kept.shape
    sets = [[set(np.flatnonzero(row)) for row in sequence] for sequence in kept]
    value: dict[tuple[str, float], float | None] = {}
    size = 1
    while size <= length:
        unused = [
            width - len(set().union(*row[first : first + size]))
            for row in sets
            for first in range(0, length - size + 1, size)
        ]
        value["unused", size] = np.mean(unused) / width
        own = kept[:, size : 2 * size]
        if own.size:
            value["sparsity", size] = 1 - own.mean()
        pairs = [(row[t], row[t - size]) for row in sets for t in range(size, length)]
        if pairs:
            reuse = [len(a & b) / len(a) for a, b in pairs if a]
            jaccard = [len(a & b) / len(a | b) for a, b in pairs if a | b]
            value["reuse", size] = np.mean(reuse) if reuse else None
            value["jaccard", size] = np.mean(jaccard) if jaccard else None
        size *= 2
    value["sparsity", 0] = 1 - kept[:, 0].mean()
    often = kept.reshape(-1, width).sum(0)
    for most in FREQUENCIES:
        value["frequency", most] = (often <= most * sequences * length).mean()
    value["always", 1] = (often == sequences * length).mean()
    return value


@pytest.mark.parametrize("shape", [(3, 8, 70), (2, 13, 5), (4, 1, 9), (1, 2, 3)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_masks_token_by_token(shape: tuple[int, int, int], density: float) -> None:
    kept = np.random.default_rng(7).random(shape) < density
    for pieces in {1, shape[0]}:
        value = {key: row["value"] for key, row in found(kept, pieces).items()}
        assert value == {key: pytest.approx(one) for key, one in brute(kept).items()}
        assert {quantity for quantity, _ in value} <= set(QUANTITIES)


def test_chance_is_what_independent_masks_have() -> None:
    draw = np.random.default_rng(3)
    frequency = draw.random(400)
    rows = found(draw.random((40, 32, 400)) < frequency)
    for quantity in ("unused", "reuse", "jaccard"):
        for at in (1, 4, 16):
            row = rows[quantity, at]
            assert row["value"] == pytest.approx(row["by_frequency"], abs=0.01)
            assert row["value"] - row["independent"] > (0.05 if at > 1 else -0.01)


def test_bits_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = np.random.default_rng(0).random((2, 8, 70)) < 0.4
    before = found(kept)
    monkeypatch.setattr(token_masks, "packed", packed_by_torch)
    assert found(kept) == before


def test_exact_zeros_are_counted_where_there_are_some(tmp_path) -> None:
    values = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    tables = MaskTables(4)
    tables.add_exact(PLACE, values)
    assert tables.table().num_rows == 0
    tables.add_exact(PLACE, values.relu())
    tables.add("0.5", PLACE, values > 0)
    write_parquet(tmp_path / "masks.parquet", tables.table())
    rows = read_parquet(tmp_path / "masks.parquet", SCHEMA).to_pylist()
    by_level = {level: [row for row in rows if row["level"] == level] for level in (EXACT, "0.5")}
    assert [{**row, "level": "0.5"} for row in by_level[EXACT]] == by_level["0.5"]
    assert {(row["layer"], row["part"], row["tensor"]) for row in rows} == {PLACE}


@pytest.mark.parametrize("site", ["input", "gate", "intermediate", "all_inputs"])
def test_what_is_looked_at_is_what_is_counted(site: str) -> None:
    ffn = find_ffns(tiny_model("llama"))[0]
    rules = {
        PlaceKey(ffn.layer, ffn.name, tensor): TopK()
        for tensor in (("input", "intermediate") if site == "all_inputs" else (site,))
    }
    x = torch.randn(12, ffn.size("input"), generator=torch.Generator().manual_seed(0))
    seen: dict[PlaceKey, torch.Tensor] = {}
    with torch.no_grad():
        own = {"input": x}
        alone = sparse_output(Output(ffn, site), own, rules, 0.25, 4)
        output = sparse_output(Output(ffn, site), own, rules, 0.25, 4, seen.__setitem__)
    assert torch.equal(alone[0], output[0])
    assert seen.keys() == rules.keys()
    assert all(kept.shape[:2] == (3, 4) for kept in seen.values())
    assert sum(int((~kept).sum()) for kept in seen.values()) == output[1] == alone[1]
