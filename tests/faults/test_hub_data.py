"""Data sets from the Hub, for the text of a capture and for tasks: pinned, recorded, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.conftest import Client, one_line
from hub_server import Fault, HubServer
from tiny_lm import CHOICE, choice_documents, save_model, sentences, settings, write_model_manifest

TEXT = "org/text"
TASK = "org/questions"
# What a task or a capture asks of a data set, without a model.
READ = """
import json, sys
from sparsity_atlas import cli
from sparsity_atlas.activations.texts import documents, pinned
def main():
    source = pinned(json.loads(sys.argv[1]))
    print(json.dumps({"revision": source["revision"], "documents": list(documents(source))}))
cli.run(main)
"""


def lines(documents: list[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in documents)


def text_files(seed: int = 0) -> dict[str, bytes]:
    documents = [{"text": one} for one in sentences(60, seed)]
    return {"data/train.jsonl": lines(documents), "README.md": b"---\nlicense: mit\n---\n"}


def read(client: Client, **more: Any) -> dict[str, Any]:
    variables = {key: value for key, value in more.items() if key.isupper()}
    source = {key: value for key, value in more.items() if not key.isupper()}
    done = client.run("-c", READ, json.dumps({"hub": TEXT, **source}), **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(client: Client, **more: Any) -> str:
    variables = {key: value for key, value in more.items() if key.isupper()}
    source = {key: value for key, value in more.items() if not key.isupper()}
    return one_line(client.run("-c", READ, json.dumps({"hub": TEXT, **source}), **variables))


def test_a_text_at_its_commit(hub: HubServer, client: Client) -> None:
    first = hub.dataset(TEXT).commit(text_files(), "main", "v1")
    found = read(client, revision="v1")
    assert found["revision"] == first
    assert found["documents"] == sentences(60)
    # Off line it is read again, and another commit of it is no substitute.
    assert read(client, revision="v1", HF_HUB_OFFLINE="1") == found
    second = hub.dataset(TEXT).commit(text_files(seed=1), "main")
    assert read(client)["documents"] == sentences(60, 1)
    error = refused(client, revision=first, HF_HUB_OFFLINE="1")
    assert f"the cache has commit {second} only" in error


def test_a_data_file_that_is_not_what_the_hub_names(hub: HubServer, client: Client) -> None:
    files = text_files()
    truth = files["data/train.jsonl"]
    commit = hub.dataset(TEXT).commit(
        {**files, "data/train.jsonl": (truth, truth.replace(b"cat", b"dog"))}
    )
    error = refused(client)
    assert all(word in error for word in ("texts", TEXT, "train.jsonl", "the Hub names"))
    # Neither the file nor tables made of it are left to be found by the next run.
    hub.dataset(TEXT).commits[commit] = files
    assert read(client)["documents"] == sentences(60)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/api/datasets", 401, {"X-Error-Code": "GatedRepo"}), ["gated", "HF_TOKEN"]),
        (Fault("resolve/.*train", 403, {"X-Error-Code": "GatedRepo"}), ["gated", "HF_TOKEN"]),
        (Fault("/api/datasets", 429, {"Retry-After": "9000"}), ["429", "9000 s"]),
        (Fault("/api/datasets", 404, {"X-Error-Code": "RepoNotFound"}), ["no such dataset"]),
    ],
    ids=["gated", "gated file", "too many", "none"],
)
def test_refused(hub: HubServer, client: Client, fault: Fault, words: list[str]) -> None:
    hub.dataset(TEXT).commit(text_files())
    hub.faults.append(fault)
    error = refused(client)
    assert all(word in error for word in ["texts", TEXT, *words]), error


def test_not_in_the_cache(hub: HubServer, client: Client) -> None:
    hub.dataset(TEXT).commit(text_files())
    assert "HF_HUB_OFFLINE" in refused(client, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("pattern", ["/api/datasets/.*/revision/main", "/tree/", "GET .*train"])
def test_a_busy_hub_is_waited_for(hub: HubServer, client: Client, pattern: str) -> None:
    hub.dataset(TEXT).commit(text_files())
    hub.faults += [
        Fault(pattern, 429, {"Retry-After": "1"}, times=1),
        Fault(pattern, 500, {"Retry-After": "0"}, times=1),
    ]
    assert read(client)["documents"] == sentences(60)


def test_a_capture_names_the_commit(hub: HubServer, client: Client, tmp_path: Path) -> None:
    commit = hub.dataset(TEXT).commit(text_files())
    manifest = write_model_manifest(save_model(tmp_path / "tiny"), tmp_path / "model.json")
    asked = {
        **{"text": {"hub": TEXT}, "tokens": 64, "sequence_length": 16, "batch_size": 4},
        **{"dtype": "auto", "device": "cpu", "add_bos_token": None},
    }
    output = tmp_path / "capture/input.json"
    done = client.stage(
        *("capture", "--model", str(manifest), "--site", "input", "--output", str(output)),
        *("--settings", json.dumps(asked), "--store", str(tmp_path / "activations.zarr")),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["text"] == {"hub": TEXT, "revision": commit}


def test_a_task_names_the_commit_of_its_data(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """Evaluated with the data of the commit; a moved branch with the same documents repeats nothing."""
    files = {"my/test.jsonl": lines(choice_documents()), "other.jsonl": b"{}"}
    commit = hub.dataset(TASK).commit(files)
    (tmp_path / "tasks").mkdir()
    config = {"task": "questions", "dataset_path": TASK, "test_split": "test", **CHOICE}
    config["dataset_kwargs"] = {"data_files": {"test": "my/test.jsonl"}}
    (tmp_path / "tasks/questions.yaml").write_text(yaml.safe_dump(config))
    manifest = write_model_manifest(save_model(tmp_path / "tiny"), tmp_path / "model.json")
    asked = settings({"questions": {"include": str(tmp_path / "tasks")}})

    def evaluate() -> dict[str, Any]:
        output = tmp_path / "dense/eval.json"
        done = client.stage(
            *("evaluate", "--model", str(manifest), "--settings", json.dumps(asked)),
            *("--output", str(output)),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())

    first = evaluate()
    assert first["data"] == {"questions": {TASK: commit}}
    moved = hub.dataset(TASK).commit({**files, "README.md": b"---\nlicense: mit\n---\n"})
    second = evaluate()
    assert second["data"] == {"questions": {TASK: moved}}
    assert second["fingerprints"] == first["fingerprints"]
