"""Every local file that a task reaches counts: for the DAG, and for what an evaluation fingerprints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from sparsity_atlas import cli
from sparsity_atlas.tasks import local_files, yaml_tasks
from sparsity_atlas.tasks.code.follow import reach
from sparsity_atlas.tasks.code.own_modules import import_roots, local
from sparsity_atlas.tasks.load import load_tasks
from tiny_lm import CHOICE, choice_documents

BEFORE, AFTER = choice_documents(6), choice_documents(6, 99)


def lines(documents: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(document) + "\n" for document in documents)


@dataclass
class Case:
    """A task in a folder, and the file of it that is edited.

    yaml: keys beside those of a task with data in d.jsonl.
    functions: keys of the YAML that name functions.
    files: by name, as they are before.
    """

    edited: str
    after: str = lines(AFTER)
    yaml: dict[str, Any] | None = None
    functions: str = ""
    files: dict[str, str] | None = None
    override: dict[str, Any] | None = None

    def write(self, folder: Path) -> dict[str, Any]:
        """Write it; returns the entry of the configuration."""
        for name, content in {"d.jsonl": lines(BEFORE), **(self.files or {})}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("FOLDER", str(folder)))
        content = {
            **{"task": "one", "dataset_path": "json", "test_split": "test"},
            **{"dataset_kwargs": {"data_files": {"test": "d.jsonl"}}},
            **CHOICE,
            **(self.yaml or {}),
        }
        if "one.yaml" not in (self.files or {}):
            written = {
                key: value for key, value in content.items() if f"{key}:" not in self.functions
            }
            text = yaml.safe_dump(written).replace("FOLDER", str(folder))
            (folder / "one.yaml").write_text(text + self.functions.replace("FOLDER", str(folder)))
        override = json.loads(json.dumps(self.override).replace("FOLDER", str(folder)))
        return {"include": str(folder), **({"override": override} if override else {})}


def data(test: Any) -> dict[str, Any]:
    return {"dataset_kwargs": {"data_files": test}}


OTHER = {"other.jsonl": lines(BEFORE)}
TEXT = "doc_to_text: !function u.f\n"
HELPED = "from common import f\n"
ON_PATH = f"import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n{HELPED}"
F, G = "def f(d):\n    return d['context']\n", "def f(d):\n    return 'z' + d['context']\n"
READS = "from pathlib import Path\nPREFIX = Path(__file__).with_name('p.txt').read_text()\n"
USES = "def f(d):\n    return PREFIX + d['context']\n"
CLASS = """
from lm_eval.api.task import ConfigurableTask
class Mine(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={key: one for key, one in config.items() if key != "class"})
    def doc_to_text(self, document, template=None):
        return PREFIX + document["context"]
"""
CODE = {
    "of_the_yaml": Case("u.py", G, functions=TEXT, files={"u.py": F}),
    "in_a_folder": Case(
        "sub/u.py", G, functions="doc_to_text: !function sub.u.f\n", files={"sub/u.py": F}
    ),
    "in_a_package": Case(
        "p/q/u.py",
        G,
        functions="doc_to_text: !function p.q.u.f\n",
        files={"p/__init__.py": "", "p/q/__init__.py": "", "p/q/u.py": F},
    ),
    "imported": Case("common.py", G, functions=TEXT, files={"u.py": ON_PATH, "common.py": F}),
    "imported_by_an_import": Case(
        "base.py",
        G,
        functions=TEXT,
        files={"u.py": ON_PATH, "common.py": "from base import f\n", "base.py": F},
    ),
    "imported_by_text": Case(
        "common.py",
        G,
        functions=TEXT,
        files={
            "u.py": "import importlib, os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n"
            "f = importlib.import_module('common').f\n",
            "common.py": F,
        },
    ),
    "imported_when_called": Case(
        "common.py",
        G,
        functions=TEXT,
        files={
            "u.py": "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n"
            "def f(d):\n    import common\n    return common.f(d)\n",
            "common.py": F,
        },
    ),
    "imported_from_a_folder": Case(
        "lib/common.py",
        G,
        functions=TEXT,
        files={
            "u.py": "import os, sys\n"
            f"sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'lib'))\n{HELPED}",
            "lib/common.py": F,
        },
    ),
    "imported_from_above": Case(
        "common.py",
        G,
        functions="doc_to_text: !function sub.u.f\n",
        files={
            "sub/u.py": "import sys\nfrom pathlib import Path\n"
            f"sys.path.insert(0, str(Path(__file__).parent.parent))\n{HELPED}",
            "common.py": F,
        },
    ),
    "a_file_that_it_reads": Case(
        "p.txt", "y", functions=TEXT, files={"u.py": READS + USES, "p.txt": "x"}
    ),
    "a_file_in_a_folder": Case(
        "texts/p.txt",
        "y",
        functions=TEXT,
        files={
            "u.py": "import os\nHERE = os.path.dirname(__file__)\n"
            f"PREFIX = open(os.path.join(HERE, 'texts', 'p.txt')).read()\n{USES}",
            "texts/p.txt": "x",
        },
    ),
    "a_file_that_a_function_of_its_own_opens": Case(
        "p.txt",
        "y",
        functions=TEXT,
        files={
            "u.py": "import os\nHERE = os.path.dirname(__file__)\n"
            "def read(name):\n    return open(os.path.join(HERE, name + '.txt')).read()\n"
            f"PREFIX = read('p')\n{USES}",
            "p.txt": "x",
        },
    ),
    "a_metric": Case(
        "m.py",
        "def mean(items):\n    return max(items)\n",
        functions="metric_list:\n- {metric: acc, aggregation: !function m.mean, higher_is_better: true}\n",
        files={"m.py": "def mean(items):\n    return sum(items) / len(items)\n"},
    ),
    "a_filter": Case(
        "m.py",
        "def keep(resps, docs):\n    return [one[-1:] for one in resps]\n",
        functions="filter_list:\n- name: kept\n  filter:\n"
        "  - {function: custom, filter_fn: !function m.keep}\n",
        files={"m.py": "def keep(resps, docs):\n    return [one[:1] for one in resps]\n"},
    ),
    "few_shot_samples": Case(
        "m.py",
        f"def some():\n    return {AFTER!r}\n",
        yaml={"num_fewshot": 2},
        functions="fewshot_config: {sampler: first_n, samples: !function m.some}\n",
        files={"m.py": f"def some():\n    return {BEFORE!r}\n"},
    ),
    "a_class": Case(
        "c.py",
        CLASS.replace("PREFIX", "'z'"),
        files={
            "c.py": CLASS.replace("PREFIX", "''"),
            "base": yaml.safe_dump(
                {
                    "dataset_path": "json",
                    "test_split": "test",
                    **data({"test": "d.jsonl"}),
                    **CHOICE,
                }
            ),
            "one.yaml": "task: one\ninclude: base\nclass: !function c.Mine\n",
        },
    ),
}
DATA = {
    "by_split": Case("d.jsonl"),
    "of_an_override": Case("other.jsonl", override=data({"test": "other.jsonl"}), files=OTHER),
    "absolute": Case("other.jsonl", override=data({"test": "FOLDER/other.jsonl"}), files=OTHER),
    "a_url": Case("other.jsonl", override=data({"test": "file://FOLDER/other.jsonl"}), files=OTHER),
    "a_list": Case("other.jsonl", override=data({"test": ["d.jsonl", "other.jsonl"]}), files=OTHER),
    "a_pattern": Case(
        "parts/b.jsonl",
        yaml=data({"test": "parts/*.jsonl"}),
        files={"parts/a.jsonl": lines(BEFORE), "parts/b.jsonl": lines(BEFORE)},
    ),
    "a_folder_of_files": Case(
        "ds/test.jsonl",
        yaml={"dataset_path": "FOLDER/ds", "dataset_kwargs": {}},
        files={"ds/test.jsonl": lines(BEFORE)},
    ),
    "a_folder_beside_the_yaml": Case(
        "ds/test.jsonl",
        yaml={"dataset_path": "ds", "dataset_kwargs": {}},
        files={"ds/test.jsonl": lines(BEFORE)},
    ),
    "data_dir": Case(
        "ds/test.jsonl",
        yaml={"dataset_kwargs": {"data_dir": "ds"}},
        files={"ds/test.jsonl": lines(BEFORE)},
    ),
    "a_custom_data_set": Case(
        "other.jsonl",
        functions="custom_dataset: !function u.load\nmetadata: {file: FOLDER/other.jsonl}\n",
        yaml={"dataset_kwargs": None},
        files={
            **OTHER,
            "u.py": "import datasets, json\ndef load(file, **_):\n"
            "    rows = [json.loads(line) for line in open(file)]\n"
            "    return {'test': datasets.Dataset.from_list(rows)}\n",
        },
    ),
    "a_generator": Case(
        "other.jsonl",
        functions="custom_dataset: !function u.load\n",
        yaml={"dataset_kwargs": None},
        files={
            **OTHER,
            "u.py": "import datasets, json\n"
            "def rows():\n    yield from map(json.loads, open('FOLDER/other.jsonl'))\n"
            "def load(**_):\n    return {'test': datasets.Dataset.from_generator(rows)}\n",
        },
    ),
    "read_while_documents_are_processed": Case(
        "p.txt",
        "y",
        functions="process_docs: !function u.all\n",
        files={
            "p.txt": "x",
            "u.py": READS.replace("PREFIX", "def one(d):\n    prefix").replace("Path(", " Path(", 0)
            + "    return {**d, 'context': prefix + d['context']}\n"
            "def all(split):\n    return split.map(one)\n",
        },
    ),
}
GROUPS = {
    "a_member": Case(
        "d.jsonl",
        files={
            "group.yaml": "group: both\ntask: [one, {task: two, dataset_kwargs: {data_files: "
            "{test: e.jsonl}}}]\n",
            "two.yaml": yaml.safe_dump({"task": "two", "include": "one.yaml"}),
            "e.jsonl": lines(BEFORE),
        },
    ),
    "a_member_s_own_data": Case(
        "e.jsonl",
        files={
            "group.yaml": "group: both\ntask: [{task: one, dataset_kwargs: {data_files: {test: e.jsonl}}}]\n",
            "e.jsonl": lines(BEFORE),
        },
    ),
    "a_member_that_is_written_out": Case(
        "e.jsonl",
        files={
            "group.yaml": yaml.safe_dump(
                {
                    "group": "both",
                    "task": [
                        {
                            "task": "inner",
                            "dataset_path": "json",
                            "test_split": "test",
                            **data({"test": "e.jsonl"}),
                            **CHOICE,
                        }
                    ],
                }
            ),
            "e.jsonl": lines(BEFORE),
        },
    ),
    "a_group_in_a_group": Case(
        "d.jsonl", files={"group.yaml": "group: both\ntask: [{group: inner, task: [one]}]\n"}
    ),
    "a_tag": Case("d.jsonl", yaml={"tag": ["both", "other"]}),
}


def seen(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    yaml_tasks.entries.cache_clear()
    found = local_files.files_digest(entry.get("include"), name, entry.get("override"))
    loaded = load_tasks({name: entry}, 1234)[name]
    assert loaded.problem is None
    return found, json.dumps(loaded.identity, sort_keys=True)


def both_notice(case: Case, folder: Path, name: str = "one") -> None:
    entry = case.write(folder)
    before = seen(name, entry)
    assert seen(name, entry) == before
    path = folder / case.edited
    assert path.read_text() != case.after
    path.write_text(case.after)
    after = seen(name, entry)
    assert before[0] != after[0], "the DAG does not see it"
    assert before[1] != after[1], "the evaluation does not see it"


@pytest.mark.parametrize("case", CODE.values(), ids=CODE)
def test_code(tmp_path: Path, case: Case) -> None:
    both_notice(case, tmp_path)


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data(tmp_path: Path, case: Case) -> None:
    both_notice(case, tmp_path)


@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_members(tmp_path: Path, case: Case) -> None:
    both_notice(case, tmp_path, "both")


def test_data_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = Case("../here.jsonl", override=data({"test": "here.jsonl"}))
    (tmp_path / "here.jsonl").write_text(lines(BEFORE))
    both_notice(case, tmp_path / "tasks")


def test_data_that_keep_their_time(tmp_path: Path) -> None:
    """As a copy or an archive has it; `datasets` by itself serves what it had of that time."""
    path = tmp_path / "d.jsonl"
    entry = Case("d.jsonl").write(tmp_path)
    before, state = seen("one", entry), path.stat()
    path.write_text(lines(AFTER))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert all(one != other for one, other in zip(before, seen("one", entry), strict=True))


OF_A_VARIABLE = {
    "a_value": ("P = os.environ.get('ATLAS_TEST')\n", "x", "y", None),
    "a_value_that_is_new": ("P = os.getenv('ATLAS_TEST') or ''\n", None, "y", None),
    "by_a_computed_name": ("N = 'ATLAS_TEST'\nP = os.environ[N]\n", "x", "y", None),
    "a_file": ("P = open(os.environ['ATLAS_TEST']).read()\n", "FAR/p.txt", "FAR/p.txt", "p.txt"),
    "in_a_folder": (
        "P = open(os.path.join(os.getenv('ATLAS_TEST'), 'p.txt')).read()\n",
        *("FAR", "FAR", "p.txt"),
    ),
    "in_a_text": (
        "P = open(os.path.expandvars('${ATLAS_TEST}/p.txt')).read()\n",
        *("FAR", "FAR", "p.txt"),
    ),
}


@pytest.mark.parametrize(
    ("code", "before", "after", "edited"), OF_A_VARIABLE.values(), ids=OF_A_VARIABLE
)
def test_what_a_variable_of_the_environment_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    before: str | None,
    after: str,
    edited: str | None,
) -> None:
    far = tmp_path / "far"
    far.mkdir()
    (far / "p.txt").write_text("x")
    if before is not None:
        monkeypatch.setenv("ATLAS_TEST", before.replace("FAR", str(far)))
    uses = "import os\n" + code + USES.replace("PREFIX", "P")
    entry = Case("", functions=TEXT, files={"u.py": uses}).write(tmp_path / "tasks")
    first, variables = seen("one", entry), local_files.variables({"one": entry})
    assert local_files.find(entry["include"], "one").computed == set()
    monkeypatch.setenv("ATLAS_TEST", after.replace("FAR", str(far)))
    if edited is not None:
        (far / edited).write_text("y")
    assert all(one != other for one, other in zip(first, seen("one", entry), strict=True))
    # A worker that was started before still has the old value.
    assert (local_files.variables({"one": entry}) != variables) == (before != after)


def test_credentials_do_not_count(tmp_path: Path) -> None:
    code = "import os\nKEY = os.environ.get('SOME_API_KEY')\n" + F
    entry = Case("", functions=TEXT, files={"u.py": code}).write(tmp_path)
    assert local_files.find(entry["include"], "one").variables == set()


UNSTEADY: dict[str, tuple[str, bool]] = {
    "the_day": ("import datetime\nP = str(datetime.date.today())\n", True),
    "the_time": ("import time\nP = str(time.time())\n", True),
    "the_machine": ("from socket import gethostname\nP = gethostname()\n", True),
    "the_folder": ("from pathlib import Path\nP = str(Path.cwd())\n", True),
    "chance": ("import numpy as np\nP = str(np.random.default_rng().random())\n", True),
    "a_hash_of_text": ("P = str(hash('a'))\n", True),
    "chance_with_a_seed": ("import random\nP = str(random.Random(3).random())\n", False),
    "a_given_day": ("import datetime\nP = str(datetime.date(2024, 7, 26))\n", False),
    "chance_that_lm_eval_seeds": ("import random\nP = str(random.random())\n", False),
}


@pytest.mark.parametrize(("code", "expected"), UNSTEADY.values(), ids=UNSTEADY)
def test_code_that_asks_for_what_is_another_each_time(
    tmp_path: Path, code: str, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"u.py": code + USES.replace("PREFIX", "P")}
    entry = Case("", functions=TEXT, files=files).write(tmp_path)
    yaml_tasks.entries.cache_clear()
    with caplog.at_level("INFO", logger=cli.logger.name):
        task = load_tasks({"one": entry}, 1)["one"]
    assert task.problem is None
    assert task.unfollowed == expected  # its requests are not kept, and are part of what it is
    assert ("asks for the time, the machine or chance" in caplog.text) == expected


def test_a_data_set_in_arrow_files(tmp_path: Path) -> None:
    def save(documents: list[dict[str, Any]]) -> None:
        shutil.rmtree(tmp_path / "ds", ignore_errors=True)
        datasets.Dataset.from_list(documents).save_to_disk(tmp_path / "ds")

    save(BEFORE)
    case = Case("", yaml={"dataset_path": "arrow", **data({"test": "ds/*.arrow"})})
    entry = case.write(tmp_path)
    before = seen("one", entry)
    assert seen("one", entry) == before
    save(AFTER)
    assert all(one != other for one, other in zip(before, seen("one", entry), strict=True))


@pytest.mark.parametrize(
    ("edited", "counts"),
    [("stranger.jsonl", False), ("stranger.py", False), ("results/a.json", False), ("u.py", True)],
)
def test_what_it_does_not_reach(tmp_path: Path, edited: str, counts: bool) -> None:
    files = dict.fromkeys(("stranger.jsonl", "stranger.py", "results/a.json"), "1\n")
    case = Case(edited, functions=TEXT, files={**files, "u.py": F, "results/run_config.yaml": ""})
    entry = case.write(tmp_path)
    yaml_tasks.entries.cache_clear()
    before = local_files.files_digest(entry["include"], "one")
    (tmp_path / edited).write_text("# another\n" + F)
    assert (local_files.files_digest(entry["include"], "one") != before) == counts


FOLLOWED: dict[str, tuple[str, bool]] = {
    "no_file": ("def f(d):\n    return ''\n", True),
    "by_name": (READS, True),
    "by_a_variable": ("NAME = 'p.txt'\nopen(NAME)\n", True),
    "a_data_set_of_the_hub": ("import datasets\ndatasets.load_dataset('a/b')\n", True),
    "an_argument": ("def f(name):\n    return open(name)\n", False),
    "a_format": ("def f(d):\n    return open(f'{d}.json')\n", False),
    "a_module": ("import importlib\ndef f(n):\n    return importlib.import_module(n)\n", False),
}


@pytest.mark.parametrize(("code", "followed"), FOLLOWED.values(), ids=FOLLOWED)
def test_code_that_cannot_be_followed_is_known(tmp_path: Path, code: str, followed: bool) -> None:
    case = Case("", functions=TEXT, files={"u.py": code, "p.txt": "x", "beside.json": "1"})
    entry = case.write(tmp_path)
    yaml_tasks.entries.cache_clear()
    found = local_files.find(entry["include"], "one")
    assert found.computed == (set() if followed else {tmp_path / "u.py"})
    assert (tmp_path / "beside.json" in found.code) == (not followed)


def write_helpers(folder: Path, prefix: str) -> dict[str, Any]:
    case = Case("", functions=TEXT, files={"u.py": ON_PATH, "common.py": G.replace("z", prefix)})
    return case.write(folder)


def first_prompt(load: Callable[[], Any]) -> str:
    (leaf,) = load().leaves.values()
    return leaf.doc_to_text(BEFORE[0])


@pytest.mark.parametrize("installed", [False, True])
def test_packages_in_a_folder_of_pythonpath_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Those that pip put there; modules of one's own are, wherever they lie."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "package.py").write_text("import deeper\n")
    (site / "deeper.py").write_text("")
    if installed:
        (site / "package-1.0.dist-info").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(site))
    start = tmp_path / "start.py"
    start.write_text("import package\n")
    found = reach([start], import_roots())
    assert {path.name for path in found.files} == (
        {"start.py"} if installed else {"start.py", "package.py", "deeper.py"}
    )
    # Not even where something else leads there.
    assert local(site / "package.py") != installed


def test_helpers_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    entries = {name: {**write_helpers(tmp_path / name, name), "task": "one"} for name in ("a", "b")}
    loaded = load_tasks(entries, 1)
    for name, task in loaded.items():
        assert first_prompt(lambda task=task: task).startswith(name)


def test_an_edited_helper_is_imported_anew(tmp_path: Path) -> None:
    """A worker stays in memory; the second file has the size of the first, and perhaps its second."""
    for prefix in ("a", "b"):
        entry = write_helpers(tmp_path, prefix)
        assert first_prompt(lambda entry=entry: load_tasks({"one": entry}, 1)["one"]).startswith(
            prefix
        )
