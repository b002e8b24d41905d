"""The tool `speed` on FFNs that take microseconds: what its rows say, not how fast they are."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_results import make_results
from sparsity_atlas.decoding import speed
from sparsity_atlas.decoding.maps import SITES
from sparsity_atlas.errors import AtlasError

ROOT = Path(__file__).parents[3]
ENTRY = {"layer": 0, "hidden": 48, "width": 96, "gated": True, "activation": {"name": "SiLU"}}


def entries(**other: Any) -> list[dict[str, Any]]:
    """Of two layers."""
    return [{**ENTRY, "layer": layer, **other} for layer in range(2)]


def test_shapes_are_those_of_plain_gated_ffns() -> None:
    routed = {**ENTRY, "part": "experts"}
    assert speed.gated_shapes({"name": "m", "ffn": [*entries(), routed]}) == {(48, 96, "silu"): 2}
    others = [routed, {**ENTRY, "gated": False}, {**ENTRY, "shaping": {}}, {**ENTRY, "norm": "n"}]
    others.append({**ENTRY, "activation": {"name": "SiLU", "before": {}}})
    with pytest.raises(AtlasError, match="m: has no plain gated FFN"):
        speed.gated_shapes({"name": "m", "ffn": others})
    with pytest.raises(AtlasError, match=r"expected silu or relu.*found 'gelu'"):
        speed.gated_shapes({"name": "m", "ffn": entries(activation={"name": "GELU"})})


@pytest.mark.parametrize(
    ("speedups", "wanted"),
    [
        ((0.8, 0.9, 1.1), 0.15),
        ((1.1, 1.2, 1.3), 0.0),
        ((0.8, 0.9, 0.95), None),
        # A point that is faster by chance, and slower again behind it, does not pay.
        ((1.1, 0.9, 1.1), 0.15),
    ],
)
def test_from_where_on_it_pays(speedups: tuple[float, ...], wanted: float | None) -> None:
    found = speed.pays_from(list(zip((0.0, 0.1, 0.2), speedups, strict=True)))
    assert found == (wanted if wanted is None else pytest.approx(wanted))


def test_rows_say_what_is_left_out_and_what_that_is_worth() -> None:
    critical = {"gate": {"topp prose PPL-1%": 0.375}}
    rows = list(speed.measure((48, 96, "silu"), critical, torch.float32, "cpu", 1, cold=0))
    assert {row["site"] for row in rows} == set(SITES)
    # Ten shares by two kinds of threshold at each site, and the model's own at one.
    assert len(rows) == 2 * (10 * len(SITES) + 1)
    spared = {"input": 2 / 3, "up": 2 / 3, "gate": 2 / 3, "intermediate": 1 / 3, "all_inputs": 1}
    for row in rows:
        if row["threshold"] == "fixed":
            assert row["unread_share"] == pytest.approx(
                spared[row["site"]] * row["sparsity"], abs=0.03
            )
        assert row["ideal_speedup"] == pytest.approx(1 / (1 - row["unread_share"]))
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["sparse_us"] > 0
    (own,) = (row for row in rows if row["of"] and row["threshold"] == "fixed")
    assert (own["site"], own["sparsity"], own["of"]) == ("gate", 0.375, "topp prose PPL-1%")
    maps = {"input": 2, "up": 1, "gate": 1, "intermediate": 1, "all_inputs": 3}
    assert all(row["copies_bytes"] == maps[row["site"]] * 48 * 96 * 4 for row in rows)


def test_the_command_reads_a_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_results(tmp_path, {"small": {"ffn": entries()}}, replicates=20)
    monkeypatch.setattr("sparsity_atlas.decoding.trial.COLD", {"cpu": 0.0})
    command = ["speed", str(tmp_path / "small"), "--dtype", "float32", "--tokens", "1", "3"]
    monkeypatch.setattr("sys.argv", command)
    speed.main()
    with (tmp_path / "small" / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == speed.COLUMNS
    assert {row["tokens"] for row in rows} == {"1", "3"}
    assert {row["layers"] for row in rows} == {"2"}
    assert {row["of"] for row in rows if row["site"] == "input"} == {
        "",
        "topp prose PPL-1%",
        "topp average 99%",
    }
    figure = tmp_path / "speed.svg"
    table = str(tmp_path / "small" / "speed.csv")
    monkeypatch.setattr("sys.argv", ["speed_figure.py", table, str(figure)])
    runpy.run_path(str(ROOT / "examples" / "speed_figure.py"), run_name="__main__")
    text = figure.read_text()
    # A panel a site for one token, and one for how it goes with several.
    assert text.count('id="axes_') == 2 * len(SITES)
    # Dots for two kinds of threshold, at the two sites that the model has curves of.
    assert text.count('id="PathCollection_') == 2 * 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tokens", "17"], "--tokens: expected 1 to 16, found 17"),
        (["--dtype", "float16"], "no kernel for float16 on a CPU"),
        (["--device", "cuda"], "torch sees no CUDA device here"),
    ],
)
def test_what_cannot_be_timed_ends_in_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["speed", str(tmp_path), *words])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(AtlasError, match=line):
        speed.main()
