"""Tasks are found with their files, refused in one line, and known by what they really contain."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import forks
from checkout import Checkout
from sparsity_atlas.tasks import load, yaml_tasks
from sparsity_atlas.tasks.load import load_tasks
from sparsity_atlas.tasks.local_files import files_digest
from tiny_lm import CHOICE, letter_documents, open_session, write_task

HELPERS = """
def shout(text):
    return text.upper()


def text(document):
    return shout(document["context"])


def all_of(documents):
    return documents


def mean(items):
    return sum(items) / len(items)
"""


def relative_task(folder: Path, name: str = "letters", **config: Any) -> dict[str, Any]:
    """A task whose data file is named as it lies beside the YAML."""
    entry = write_task(folder, name, letter_documents(), **CHOICE)
    path = folder / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content["dataset_kwargs"] = {"data_files": {"test": f"{name}.jsonl"}}
    path.write_text(yaml.safe_dump({**content, **config}))
    return entry


def identity(entry: dict[str, Any], seed: int = 1234, name: str = "letters") -> dict[str, Any]:
    return load_tasks({name: entry}, seed)[name].identity


def test_data_beside_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = relative_task(tmp_path / "tasks")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    task = load_tasks({"mine": entry}, 1)["mine"]
    assert list(task.leaves) == ["letters"]
    assert [dict(one) for one in task.leaves["letters"].eval_docs] == letter_documents()


def test_the_name_in_the_configuration_is_the_task_by_default(tmp_path: Path) -> None:
    entry = relative_task(tmp_path)
    del entry["task"]
    assert load_tasks({"letters": entry}, 1)["letters"].lm_eval_name == "letters"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"task": "leters"}, r"lm-eval has no task 'leters'; close names: letters"),
        ({"include": "nowhere"}, r"include: nowhere: no such folder"),
        (
            {"override": {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}},
            r"'letters': cannot be loaded: .*none\.jsonl.*",
        ),
        ({"override": {"tag": "all"}}, r"override: tag: it cannot be replaced; write a YAML.*"),
        ({"override": {"include": "a.yaml"}}, r"override: include: it cannot be replaced; .*"),
        (
            {"override": {"doc_to_text": "!function u.f"}},
            r"override: doc_to_text: `!function` is plain text in a configuration; .*",
        ),
        (
            {"override": {"dataset_path": "~/data"}},
            r"dataset_path: '~/data': no such file or folder, .*",
        ),
        (
            {"override": {"test_split": "exam"}},
            r"'letters': cannot be loaded: its data have no split 'exam'; they have test",
        ),
    ],
)
def test_one_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, problem: str
) -> None:
    entry = relative_task(tmp_path / "tasks")
    # lm-eval's own catalogue is read where a name is not found, which takes seconds.
    monkeypatch.setattr(load, "built_in_tasks", dict)
    loaded = load_tasks({"mine": {**entry, **change}, "good": entry}, 1)
    assert re.fullmatch(problem, loaded["mine"].problem)
    assert not loaded["mine"].leaves
    assert loaded["good"].problem is None


def test_identity_is_that_of_the_documents_in_use(tmp_path: Path) -> None:
    entry = relative_task(tmp_path)
    limited = {**entry, "limit": 4}
    before, first_four = identity(entry), identity(limited)
    assert before != first_four
    assert identity(entry) == before
    path = tmp_path / "letters.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1].replace("label", "label")]))
    assert identity(entry) == before
    edited = json.loads(lines[7])
    edited["label"] = (edited["label"] + 1) % 4
    lines[7] = json.dumps(edited) + "\n"
    path.write_text("".join(lines))
    assert identity(entry) != before
    # The eighth document is none of the first four.
    assert identity(limited) == first_four


def test_identity_follows_shots_seed_and_override(tmp_path: Path) -> None:
    entry = relative_task(tmp_path, fewshot_split="test", num_fewshot=2)
    variants = [
        identity(entry),
        identity(entry, seed=1),
        identity({**entry, "num_fewshot": 1}),
        identity({**entry, "override": {"doc_to_text": "{{context}}?"}}),
        identity({**entry, "cluster": "context"}),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in variants}) == len(variants)


def test_identity_of_python_helpers(tmp_path: Path) -> None:
    relative_task(tmp_path)
    path = tmp_path / "letters.yaml"
    content = yaml.safe_load(path.read_text())
    for key in ("doc_to_text", "metric_list"):
        del content[key]
    path.write_text(
        yaml.safe_dump(content)
        + "doc_to_text: !function helpers.text\n"
        + "process_docs: !function helpers.all_of\n"
        + "metric_list: [{metric: acc, aggregation: !function helpers.mean, "
        + "higher_is_better: true}]\n"
    )
    (tmp_path / "helpers.py").write_text(HELPERS)
    program = (
        "import json, sys; from sparsity_atlas.tasks.load import load_tasks;"
        f"entry = {{'task': 'letters', 'include': {str(tmp_path)!r}}};"
        "print(json.dumps(load_tasks({'letters': entry}, 1)['letters'].identity))"
    )

    def in_another_process() -> dict[str, Any]:
        run = forks.run("-c", program, merged=False, **Checkout(tmp_path).forked())
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    first = in_another_process()
    # No address of a function in it: another process, this one, finds the same.
    assert identity({"task": "letters", "include": str(tmp_path)}, seed=1) == first
    (tmp_path / "helpers.py").write_text(HELPERS.replace("upper", "lower"))
    assert in_another_process() != first


CODE = """
import functools, json, random, re


def text(document, before="", *, after=""):
    return before + document["context"] + after


class Text:
    def __init__(self, before):
        self.before = before

    def __call__(self, document):
        return self.before + document["context"]

    def method(self, document):
        return self(document)


def around(before):
    return lambda document: before + document["context"]


partial = functools.partial(text, before=BEFORE)
nested = functools.partial(functools.partial(text, after=BEFORE), before="x")
called = Text(BEFORE)
method = Text(BEFORE).method
closure = around(BEFORE)
"""


@pytest.mark.parametrize("name", ["partial", "nested", "called", "method", "closure"])
def test_identity_of_what_holds_values(tmp_path: Path, name: str) -> None:
    """No address in it, which is another one each time; what it holds counts, not its file alone."""
    entry = relative_task(tmp_path)
    path = tmp_path / "letters.yaml"
    content = yaml.safe_load(path.read_text())
    del content["doc_to_text"]
    path.write_text(yaml.safe_dump(content) + f"doc_to_text: !function held.{name}\n")
    (tmp_path / "value.txt").write_text("a")
    reads = (
        "import os\nBEFORE = open(os.path.join(os.path.dirname(__file__), 'value.txt')).read()\n"
    )
    (tmp_path / "held.py").write_text(reads + CODE)

    def config() -> str:
        return identity(entry)["leaves"]["letters"]["config"]

    first = config()
    keep = [object() for _ in range(1000)]  # so that nothing lies where it lay
    assert config() == first
    assert keep
    (tmp_path / "value.txt").write_text("b")
    assert config() != first


SHUFFLES = """
import random


def of_a_map(split):
    def one(document):
        order = list(document["choices"])
        random.shuffle(order)
        return {**document, "choices": order}

    return split.map(one)


def of_all(split):
    return split.select(random.sample(range(len(split)), len(split)))
"""


@pytest.mark.parametrize("name", ["of_a_map", "of_all"])
def test_what_is_drawn_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same in each process and whatever was loaded before; at lm-eval's seeds as lm-eval draws."""
    entry = relative_task(tmp_path)
    with (tmp_path / "letters.yaml").open("a") as file:
        file.write(f"process_docs: !function shuffles.{name}\n")
    (tmp_path / "shuffles.py").write_text(SHUFFLES)

    def documents(task: Any) -> list[dict[str, Any]]:
        return [document for _, document in task.doc_iterator()]

    def ours(seed: int = 1234) -> list[dict[str, Any]]:
        random.random()
        return documents(load_tasks({"letters": entry}, seed)["letters"].leaves["letters"])

    first = ours()
    assert ours() == first
    assert ours(7) != first
    assert ours() == first
    (once,) = load_tasks({"letters": entry}, 1234)["letters"].leaves.values()
    assert documents(once) == documents(once)
    if name == "of_a_map":
        # lm-eval asks several times; `datasets` keeps the first answer of a map, of nothing else.
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")
        asked = of_lm_eval(tmp_path)
        wanted = [option for one in first for option in one["choices"]]
        assert [continuation.strip() for _, continuation in asked] == wanted


class Recorder(LM):
    """Notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked = [request.args for request in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


def of_lm_eval(folder: Path) -> list[tuple[str, str]]:
    """What plain lm-eval asks a model for, of the task in a folder."""
    model = Recorder()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    simple_evaluate(model=model, tasks=["letters"], task_manager=manager, bootstrap_iters=0)
    return model.asked


def test_what_is_drawn_while_requests_are_built(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = relative_task(tmp_path)
    path = tmp_path / "letters.yaml"
    content = yaml.safe_load(path.read_text())
    del content["doc_to_text"]
    path.write_text(yaml.safe_dump(content) + "doc_to_text: !function draws.text\n")
    (tmp_path / "draws.py").write_text(
        "import random\ndef text(document):\n    return f'{random.random()}'\n"
    )
    monkeypatch.chdir(tmp_path)
    session = open_session(manifest, {"letters": entry})
    random.random()
    (leaf,) = session.prepared("letters").leaves.values()
    assert [one.args for one in leaf.instances] == of_lm_eval(tmp_path)


# Without lm-eval


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """A group of two tasks, one of which includes a common file and has a helper."""
    relative_task(tmp_path, "one")
    relative_task(tmp_path, "two")
    path = tmp_path / "two.yaml"
    content = yaml.safe_load(path.read_text())
    del content["doc_to_text"]
    path.write_text(
        yaml.safe_dump(content) + "include: common\ndoc_to_text: !function helpers.text\n"
    )
    (tmp_path / "common").write_text("output_type: multiple_choice\n")
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, {task: two}]\n")
    (tmp_path / "stranger.yaml").write_text("task: stranger\n")
    return tmp_path


def digest_of(folder: Path, name: str) -> str:
    yaml_tasks.entries.cache_clear()
    return files_digest(str(folder), name)


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        ("one.yaml", {"one", "both"}),
        ("one.jsonl", {"one", "both"}),
        ("two.yaml", {"two", "both"}),
        ("two.jsonl", {"two", "both"}),
        ("common", {"two", "both"}),
        ("helpers.py", {"two", "both"}),
        ("both.yaml", {"both"}),
        ("stranger.yaml", set()),
    ],
)
def test_a_file_changes_the_tasks_it_is_part_of(group: Path, file: str, tasks: set[str]) -> None:
    before = {name: digest_of(group, name) for name in ("one", "two", "both")}
    assert all(before.values())
    path = group / file
    path.write_text(path.read_text() + "\n\n")
    after = {name: digest_of(group, name) for name in before}
    assert {name for name in before if before[name] != after[name]} == tasks


def test_tasks_of_lm_eval_s_own_have_no_files(group: Path) -> None:
    assert digest_of(group, "hellaswag") == ""
    assert files_digest(None, "hellaswag") == ""
