"""Names and spellings of the configuration that mean something to tables, paths and Snakemake."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from snakemake_logger_plugin_atlas import misplaced
from sparsity_atlas.config import grid
from sparsity_atlas.config.documents import schema
from sparsity_atlas.config.record import render
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.rules.inputs import locate

BASE: dict[str, Any] = {
    "models": {"m": {"path": "model"}},
    "criteria": {"topp": {}},
    "texts": {"prose": {"file": "prose.jsonl"}},
    "tasks": {"pairs": {}},
    "run": [{"models": ["m"], "levels": [0.9]}],
}


def with_entry(catalogue: str, name: str) -> dict[str, Any]:
    data = copy.deepcopy(BASE)
    (entry,) = data[catalogue].values()
    data[catalogue][name] = entry
    return data


@pytest.mark.parametrize("catalogue", ["models", "criteria", "texts", "tasks"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "folder of the results") for name in ("dense", "Capture", "metrics", "logs")),
        *((name, "folder of the results") for name in ("benchmarks", "figures", "partial")),
        *((name, "ends like a file") for name in ("index.html", "run_config.yaml", "a.csv")),
        *((name, "read from a table") for name in ("average", "nan", "NULL", "None", "true", "NA")),
        *((name, "read from a table") for name in ("1e5", "007", "3.5", "Infinity")),
        (".snakemake", "names are letters"),
    ],
)
def test_names_that_mean_something_else(catalogue: str, name: str, message: str) -> None:
    with pytest.raises(AtlasError, match=f"{catalogue}.*{message}"):
        parse(with_entry(catalogue, name))


@pytest.mark.parametrize("name", ["7b", "1e5x", "nano", "averages", "all", "mean", "v1.5"])
def test_names_that_only_look_like_it(name: str) -> None:
    parse(with_entry("models", name))


@pytest.mark.parametrize("catalogue", ["models", "criteria", "texts", "tasks"])
def test_names_that_differ_by_capitals(catalogue: str) -> None:
    (name,) = BASE[catalogue]
    with pytest.raises(AtlasError, match=f"{catalogue}: '{name}' and '{name.upper()}' differ by"):
        parse(with_entry(catalogue, name.upper()))


ANCHORS = """
x-more: &more {apply_chat_template: true, max_length: 512}
x-list: [1, 2]
models:
  m: {<<: *more, path: model}
"""


def test_keys_for_anchors_are_the_user_s_own() -> None:
    data = {**BASE, **yaml.safe_load(ANCHORS)}
    config = parse(data)
    assert config.models["m"].max_length == 512
    assert "x-" not in render(config)
    jsonschema.validate(data, schema())
    with pytest.raises(AtlasError, match="y-more: unknown key"):
        parse({**BASE, "y-more": {}})
    with pytest.raises(AtlasError, match=r"models\.m\.x-more: unknown key"):
        parse({**BASE, "models": {"m": {"path": "model", "x-more": 1}}})


def test_a_local_folder_by_other_spellings(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home, a slash at the end and a link: the same model; the first two to Snakemake, too."""
    monkeypatch.setenv("HOME", str(model_folder.parent))
    (tmp_path / "link").symlink_to(model_folder)
    spelled = [str(model_folder), f"{model_folder}//", f"~/{model_folder.name}", "link/"]
    monkeypatch.chdir(tmp_path)
    slices, digests = [], set()
    for path in spelled:
        config = parse(locate({**BASE, "models": {"m": {"path": path}}}, tmp_path))
        slices.append(grid.fetch_slice(config, "m"))
        digests.add(Checkpoint(Path(config.models["m"].path)).digest())
    assert len(digests) == 1
    assert slices[0] == slices[1] == slices[2]


def test_text_criterion_and_include_by_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {
        **BASE,
        "texts": {"prose": {"file": "~/a.jsonl"}},
        "criteria": {"mine": {"file": "~/mine.py"}},
        "tasks": {"pairs": {"include": "~/tasks/"}},
    }
    found = locate(data, tmp_path)
    assert found["texts"]["prose"]["file"] == str(tmp_path / "a.jsonl")
    assert found["criteria"]["mine"]["file"] == str(tmp_path / "mine.py")
    assert found["tasks"]["pairs"]["include"] == str(tmp_path / "tasks")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--configfile mine.yaml results/m/summary.csv", "results/m/summary.csv"),
        ("-c 1 --configfile mine.yaml plan -n", "plan"),
        (
            "--configfiles a.yaml b.yml c.json results/m/dense/eval.json",
            "results/m/dense/eval.json",
        ),
        ("--configfile mine.yaml", None),
        ("--configfile a.yaml b.yml c.json --cores 1 plan", None),
        ("--configfile=mine.yaml plan", None),
        ("plan --configfile mine.yaml", None),
        ("--configfile mine.yaml -- plan", None),
    ],
)
def test_a_target_behind_a_configuration(
    words: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "a.yaml", "b.yml", "c.json"):
        Path(name).touch()
    mistake = misplaced(["snakemake", *words.split()])
    assert (mistake is None) == (found is None)
    if found is not None:
        assert f"'{found}' is no configuration; write --configfile=" in mistake


@pytest.mark.parametrize("words", ["--configfile none.yaml", "--configfile=none.yaml plan"])
def test_a_configuration_that_is_not_there(words: str) -> None:
    assert misplaced(["snakemake", *words.split()]) == "--configfile: none.yaml: no such file"
