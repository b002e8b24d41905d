"""Two results folders side by side: what is said to differ, and by how much."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fake_results import make_results
from sparsity_atlas.curves.equal_sparsity import read_equal, write_equal
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest, write_manifest
from sparsity_atlas.report import compare

CONFIG = {
    "seed": 1,
    "replicates": 100,
    "tasks": {"prose": {}, "pairs": {"cluster": None}},
    "run": [{"models": ["m"], "levels": ["0.9", "0.5"]}],
}


def write_config(folder: Path, torch: str = "2.13.0", **changes: object) -> None:
    text = yaml.safe_dump({**CONFIG, **changes})
    (folder / "run_config.yaml").write_text(f"# torch {torch}\n# zarr 3.1\n{text}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one model, and one of another of the same name that tolerates more and has a further site."""
    folder = tmp_path_factory.mktemp("runs")
    make_results(folder / "a", {"m": {"tolerance": 0.5}}, sites=("intermediate",))
    make_results(folder / "b", {"m": {"tolerance": 0.55}}, sites=("intermediate", "input"))
    for name in ("a", "b"):
        write_config(folder / name)
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs/a", tmp_path / "runs/b"


def said(first: Path, second: Path) -> str:
    one, two = compare.Results(first), compare.Results(second)
    return "\n".join(compare.text(one, two, list(compare.rows(one, two))))


def test_differences_are_those_of_the_curves_and_paired(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "differences.csv"
    monkeypatch.setattr("sys.argv", ["compare", *map(str, pair), "--csv", str(target)])
    compare.main()
    table = pd.read_csv(target).query("measure == 'critical' and `at` == 0.99").set_index("task")
    ends = [
        {
            row["task"]: row["value"]
            for row in read_manifest(folder / "m/topp/intermediate/curve.json")["critical"]
            if row["bar"] == 0.99
        }
        for folder in pair
    ]
    for task in ("prose", "pairs", "average"):
        row = table.loc[task]
        assert (row["first_value"], row["second_value"]) == pytest.approx(
            (ends[0][task], ends[1][task])
        )
        assert row["difference"] == pytest.approx(ends[1][task] - ends[0][task])
        assert row["paired"]
    shown = capsys.readouterr().out
    assert "Versions: the same" in shown
    assert "Configuration: the same" in shown
    assert "Curves in B only: m/topp/input" in shown
    assert f"{100 * table.loc['prose', 'first_value']:.1f}" in shown


def test_the_same_folder_does_not_differ(pair: tuple[Path, Path]) -> None:
    shown = said(pair[0], pair[0])
    assert "3 of 3 are the same to the last digit" in shown
    assert "Curves in" not in shown
    assert "not paired" not in shown


def test_what_changed_is_named(pair: tuple[Path, Path]) -> None:
    write_config(
        pair[1], torch="2.14.0", run=[{"models": ["m"], "levels": ["0.9"]}], extra={"new": 1}
    )
    for folder, code in zip(pair, ("one", "two"), strict=True):
        for node in ("m/dense", "m/topp/intermediate/0.9"):
            write_manifest(
                folder / node / "eval.json", {"tasks": {}, "run": {"code": code, "dtype": "f"}}
            )
    shown = said(*pair)
    assert "torch: 2.13.0 → 2.14.0" in shown
    assert "zarr" not in shown
    assert 'run.0.levels: ["0.9", "0.5"] → ["0.9"]' in shown
    assert "extra.new: – → 1" in shown
    assert 'code: "one" → "two" (2 of 5 nodes)' in shown
    assert "dtype" not in shown


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"replicates": 200}, {"tasks": {"prose": {}, "pairs": {"cluster": "x"}}}],
)
def test_other_draws_are_not_paired(pair: tuple[Path, Path], change: dict[str, object]) -> None:
    write_config(pair[1], **change)
    rows = list(compare.rows(*map(compare.Results, pair)))
    assert rows
    assert not any(row["paired"] for row in rows)
    assert "not paired" in said(*pair)


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)])
def test_a_run_without_a_record_is_no_change_of_everything(
    pair: tuple[Path, Path], without: tuple[int, ...]
) -> None:
    """A run of single curves writes none: nothing is known of its configuration, nor of its draws."""
    for place in without:
        (pair[place] / "run_config.yaml").unlink()
    shown = said(*pair)
    lacking = "A and B have" if len(without) > 1 else f"{'AB'[without[0]]} has"
    assert f"Versions and configuration: not compared, since {lacking} no run_config.yaml" in shown
    assert "→" not in shown
    assert not any(row["paired"] for row in compare.rows(*map(compare.Results, pair)))


def test_nothing_in_common(pair: tuple[Path, Path]) -> None:
    (pair[1] / "m").rename(pair[1] / "n")
    assert said(*pair).endswith("Curves: none in common.")


def test_curves_without_a_number_at_the_bar_are_not_passed_over(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        rows = read_equal(folder / "m/topp/intermediate/equal_sparsity.parquet")
        write_equal(folder / "m/topp/intermediate/equal_sparsity.parquet", rows)
    assert said(*pair).endswith("Curves: 1 in common, none with a number at the bar of 99 %.")


@pytest.mark.parametrize(("folder", "why"), [("none", "no such folder"), (".", "no curve")])
def test_a_folder_without_results_is_refused(tmp_path: Path, folder: str, why: str) -> None:
    with pytest.raises(AtlasError, match=why):
        compare.Results(tmp_path / folder)
