"""Configurations, task files, models and results are somebody else's: none of them gets out of line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from checkout import Checkout
from fake_results import make_results
from sparsity_atlas.activations import text_files, texts
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.figures.draw import draw_all
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.files.whole import read_json, read_manifest, write_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.report import report
from sparsity_atlas.rules.inputs import check_inputs, locate, model_content
from sparsity_atlas.tables import summarize
from sparsity_atlas.tables.read import read_tables
from sparsity_atlas.tasks import local_files, yaml_tasks
from tiny_lm import tiny_tokenizer

BASE: dict[str, Any] = {
    "models": {"small": {"path": "models/small"}},
    "criteria": {"topp": None},
    "texts": {"prose": {"file": "prose.jsonl"}},
    "tasks": {"pairs": {}},
    "run": [{"models": ["small"]}],
}

# Names


@pytest.mark.parametrize("catalogue", ["models", "criteria", "texts", "tasks"])
@pytest.mark.parametrize(
    "name",
    [
        *("../up", "..", "a/../../b", "/etc/passwd", "a/b", "a\\b", "~", "$(touch x)", "a;b"),
        *("<script>", "a\nb", "a\0b", "a b", "\u202egnp", "logs", "LOGS", "Figures", "x" * 101),
        *("activations.zarr", "model.json", "summary.csv", "index.HTML", "a.journal", "a.lock"),
    ],
)
def test_names_stay_in_their_folder(catalogue: str, name: str) -> None:
    data = copy.deepcopy(BASE)
    data[catalogue][name] = dict(data[catalogue][next(iter(data[catalogue]))] or {})
    with pytest.raises(AtlasError, match=f"config: {catalogue}"):
        parse(data)


@pytest.mark.parametrize(
    "level",
    ["../0.5", "0.5/..", "1e999999999", "1e-999999999", "1e400", 1e300, "٣/../x", 10**5000],
    ids=lambda level: str(level)[:12] if not isinstance(level, int) else "10 ** 5000",
)
def test_levels_are_numbers_of_a_reasonable_length(level: Any) -> None:
    data = copy.deepcopy(BASE)
    data["run"][0]["levels"] = [level]
    with pytest.raises(AtlasError, match=r"run\.0\.levels\.0: a level (is|has)") as caught:
        parse(data)
    assert len(str(caught.value)) < 500


def test_a_level_is_spelled_in_ascii() -> None:
    data = copy.deepcopy(BASE)
    data["run"][0]["levels"] = [" ٠.٥\n"]
    assert parse(data).run[0].levels == ["0.5"]


@pytest.mark.parametrize("site", ["../input", "input/..", "down", "INPUT"])
def test_sites_are_known(site: str) -> None:
    data = copy.deepcopy(BASE)
    data["run"][0]["sites"] = [site]
    with pytest.raises(AtlasError, match=r"run\.0\.sites"):
        parse(data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hub": "../../etc"}, "a repository of the Hub is"),
        ({"hub": "a/b/c"}, "a repository of the Hub is"),
        ({"hub": "http://host/a"}, "a repository of the Hub is"),
        ({"hub": "a/b", "revision": "../../../refs"}, "a revision is"),
        ({"hub": "a/b", "revision": "/abs"}, "a revision is"),
        ({"hub": "a/b", "code_revision": "main"}, "needs `trust_remote_code: true`"),
    ],
)
def test_repositories_and_revisions(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        parse({**BASE, "models": {"small": entry}})


@pytest.mark.parametrize("target", ["results/../../x/eval.json", "results/zoo-small/topp/down/1"])
def test_a_path_that_is_asked_for(empty: Checkout, target: str) -> None:
    planned = empty.plan(target)
    assert planned.returncode != 0
    assert planned.jobs == set()


# YAML

RUNS = "!!python/object/apply:os.system ['touch ran']"


def test_yaml_makes_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, lm-eval's and Snakemake's reading of a file that somebody sent."""
    monkeypatch.chdir(tmp_path)
    include = tmp_path / "tasks"
    include.mkdir()
    (include / "a.yaml").write_text(f"task: a\ndataset_path: {RUNS}\n")
    with pytest.raises(AtlasError, match="not YAML"):
        local_files.files_digest(str(include), "a")
    index = "from lm_eval.tasks import TaskManager as T\n"
    index += f"T(include_path={str(include)!r}, include_defaults=False).load('a')"
    subprocess.run([sys.executable, "-c", index], capture_output=True, cwd=tmp_path, check=False)
    assert not (tmp_path / "ran").exists()


def test_the_configuration_makes_no_objects(empty: Checkout) -> None:
    (empty.path / "sent.yaml").write_text(f"seed: {RUNS}\n")
    planned = empty.plan("--configfile", "sent.yaml")
    assert planned.returncode != 0
    assert not (empty.path / "ran").exists()


def bomb() -> str:
    """Nine lists of nine of the one before: a few lines that are 9 ** 9 strings."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        f"task: a\n{bomb()}\n",
        "task: a\nb: &b [*b]\n",
        "task: a\ntask_alias: " + "x" * 400,
        "task: a\ninclude: [1, 2]\n",
        "task: a\ninclude: a.yaml\n",
        "group: a\ntask: [1, null, [x], {group: a}, a]\n",
        "task: a\nname: !function a.b\nother: !function [x]\n",
        'task: a\nname: "\\0"\n',
        "[]",
        "",
    ],
    ids=lambda text: text[:24],
)
def test_strange_task_files_have_a_digest(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    yaml_tasks.entries.cache_clear()
    assert len(local_files.files_digest(str(tmp_path), "a")) in (0, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("[" * 100_000, "not YAML"),
        ("a: 2020-13-45", "not YAML"),
        ("a: \x07", "not YAML"),
        ("a: " + "x" * 2**20, "bytes; at most 1,048,576 are read"),
    ],
    ids=["open", "deep", "date", "bell", "long"],
)
def test_task_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    yaml_tasks.entries.cache_clear()
    with pytest.raises(AtlasError, match=message) as caught:
        local_files.files_digest(str(tmp_path), "a")
    assert "a.yaml" in str(caught.value)


# Models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    Checkpoint(tmp_path).config()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, found list"),
        ("{", "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"quantization_config": "gptq"}', "quantised"),
        ('{"quantization_config": {"quant_method": "<b>"}}', "quantised"),
    ],
    ids=lambda text: text[:24],
)
def test_a_models_configuration(model: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(AtlasError, match=message):
        Checkpoint(model).config()


def test_a_file_that_is_too_large_for_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 2**33)
    with pytest.raises(AtlasError, match="8,589,934,592 bytes; at most 268,435,456 are read"):
        read_json(path)
    with pytest.raises(AtlasError, match=r"damaged manifest \(8,589,934,592 bytes"):
        read_manifest(path)


@pytest.mark.parametrize(
    "index",
    [
        *({}, [], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ""}}),
        *({"weight_map": {"a": "../x"}}, {"weight_map": {"a": "/etc/passwd"}}),
        {"weight_map": {"a": "b/model.safetensors"}},
    ],
    ids=repr,
)
def test_an_index_of_weights(model: Path, index: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        AtlasError, match=r"index\.json: (expected 'weight_map'|.* is not the name)"
    ):
        Checkpoint(model).weight_files()


def test_an_index_with_a_name_that_no_file_can_have(model: Path) -> None:
    """Found by fuzzing."""
    index = {"weight_map": {"a": "9" * 5000}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AtlasError, match="the index names 999"):
        Checkpoint(model).weight_files()


@pytest.mark.parametrize("auto_map", [None, 3, "a--b", {"A": ["x--y.Z", None, 3]}, {"A": {}}])
def test_strange_maps_of_classes(model: Path, auto_map: Any) -> None:
    (model / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert Checkpoint(model).code_repository() in (None, "a", "x")


# Our own files, by somebody else's hand


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"number": 1', '"number": 2'),
        ('"number": 1', '"number": NaN'),
        ('"number": 1', '"more": 0, "number": 1'),
        ('"checksum": "', '"checksum": "0'),
        ('"checksum"', '"check"'),
    ],
)
def test_a_manifest_that_was_changed(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.json"
    write_manifest(path, {"number": 1, "list": [0.1, (2, "x")], "map": {3: None}})
    assert read_manifest(path)["number"] == 1
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(AtlasError, match=r"damaged manifest .*; delete it and run again"):
        read_manifest(path)


SCHEMA = pa.schema([("level", pa.string()), ("value", pa.float64())])


def test_every_flipped_bit_of_a_table_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"level": str(i), "value": i * 0.1} for i in range(50)]
    write_parquet(path, pa.Table.from_pylist(rows, SCHEMA))
    assert read_parquet(path, SCHEMA).to_pylist() == rows
    assert pq.read_table(path).to_pylist() == rows
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises(AtlasError, match="damaged table"):
            read_parquet(path, SCHEMA)
    for length in (0, 4, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(AtlasError, match="damaged table"):
            read_parquet(path, SCHEMA)


def test_a_small_file_of_very_many_rows(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    schema = pa.schema([("value", pa.int8())])
    write_parquet(path, pa.table({"value": np.zeros(110_000_000, np.int8)}))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(AtlasError, match=r"110,000,000 rows .*; at most 100,000,000"):
        read_parquet(path, schema)


def test_other_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"level": [1]}))
    with pytest.raises(AtlasError, match="expected the columns level, value, found level"):
        read_parquet(tmp_path / "a.parquet", SCHEMA)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_document_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 1000)
    path = tmp_path / f"a{suffix}"
    path.write_text("x" * 5000)
    with pytest.raises(AtlasError, match=r"a\.\w+: line 1 on: a document of more than 1,000"):
        texts.token_ids({"file": str(path)}, tiny_tokenizer(), 10, 10, bos=False)


# The report and the terminal

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    """Whatever a model, its log or the configuration says, the page's elements are its own."""
    results = make_results(
        tmp_path,
        {
            "evil": {
                **{"architecture": EVIL, "activation": EVIL, "dtype": EVIL, "revision": EVIL},
                "source": {"path": EVIL},
            }
        },
    )
    config = {
        **{"texts": {"prose": {"file": EVIL}}, "tasks": {"prose": {"cluster": EVIL}, "pairs": {}}},
        "models": {"evil": {"path": EVIL}, "absent": {"path": EVIL}},
        "criteria": {"topp": {"power": 1, "note": EVIL}},
        "run": [{"models": ["evil", "absent"], "sites": ["input", "intermediate"]}],
    }
    log = results / "logs/absent/model.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"error: {EVIL} \x1b[31m\n")
    report.partial(results, config)
    page = (results / "index.html").read_text()
    assert page.count("&lt;script&gt;") > 5
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page


def test_the_figures_escape_what_they_show(tmp_path: Path) -> None:
    models = {"a": {"architecture": EVIL, "activation": EVIL}, "b": {}}
    results = make_results(tmp_path, models, sites=("input",))
    summarize.write_tables(
        results,
        sorted(results.glob("*/model.json")),
        sorted(results.glob("*/*/*/curve.json")),
        sorted(results.glob("*/*/*/sparsity.parquet")),
        sorted(results.glob("*/metrics/*.parquet")),
        sorted(results.glob("*/*/*/sensitivity.parquet")),
    )
    draw_all(read_tables(sorted(results.glob("*.csv"))), tmp_path / "figures")
    for name in FIGURES:
        assert "<script" not in (tmp_path / f"figures/{name}.svg").read_text()


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = str(AtlasError("a\r\nb\x1b]0;title\x07 \u202e" + "x" * 10_000))
    assert error.isprintable()
    assert error.startswith("a b\ufffd]0;title\ufffd")
    assert len(error) < 2100


@pytest.mark.parametrize(
    ("catalogue", "key", "message"),
    [
        ("tasks", "include", "tasks.pairs: include: 9+: no such folder"),
        ("texts", "file", "texts.prose: file: 9+: no such file"),
        ("criteria", "file", "criteria: 9+: no such file"),
    ],
)
def test_paths_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogue: str, key: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.jsonl").touch()
    data = copy.deepcopy(BASE)
    (name,) = data[catalogue]
    data[catalogue][name] = {key: "9" * 1000}
    with pytest.raises(AtlasError, match=message):
        check_inputs(parse(locate(data, tmp_path)))


def test_a_model_whose_path_no_folder_can_have(tmp_path: Path) -> None:
    """Left to its job, like any other folder that cannot be used."""
    data = {**BASE, "models": {"small": {"path": "9" * 1000}}}
    assert model_content(parse(locate(data, tmp_path)), "small") == ""
    with pytest.raises(AtlasError, match=r"models: 9+: no such folder"):
        resolve({"path": "9" * 1000})
