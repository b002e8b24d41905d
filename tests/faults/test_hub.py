"""Models from the Hub: which commit, what becomes of a bad line or file, and what each refusal says."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from faults.conftest import Client, one_line
from hub_server import Fault, HubServer

NAME = "org/small"
WEIGHTS = rf"GET /{NAME}/resolve/\w+/model\.safetensors"


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same model in two files of weights."""
    tensors = load_tensors(files["model.safetensors"])
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
    others = {key: value for key, value in files.items() if key != "model.safetensors"}
    return {
        **others,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{
            part: save_tensors({name: tensors[name] for name in own}, {"format": "pt"})
            for part, own in parts.items()
        },
    }


def pickled(files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    """The same model with pickled weights."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(load_tensors(files["model.safetensors"]), path)
    others = {key: value for key, value in files.items() if key != "model.safetensors"}
    return {**others, path.name: path.read_bytes()}


def test_a_zoo_model_as_from_its_folder(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    """The branch is resolved to a commit, which the manifest names; later jobs use that commit."""
    first = hub.model(NAME).commit(zoo_files, "main", "v1")
    made = tmp_path / "model.json"
    done = client.stage(
        *("models", "--name", "m", "--source", json.dumps({"hub": NAME, "revision": "v1"})),
        *("--output", str(made)),
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(made.read_text())
    assert manifest["revision"] == first
    assert manifest["source"] == {"hub": NAME, "revision": "v1"}
    # No line on each request, whose address may be signed.
    assert "HTTP" not in done.stderr

    # The tag moves; what was measured stays what it is.
    hub.model(NAME).commit({**zoo_files, "notes.txt": b"other"}, "main", "v1")
    requests = len(hub.requests)
    read = "from sparsity_atlas.models.manifest import from_manifest as f\n"
    read += "from pathlib import Path; import sys\n"
    read += "print(f(Path(sys.argv[1]))[1].folder.name)"
    again = client.run("-c", read, str(made))
    assert again.stdout.strip() == first, again.stderr
    # From the cache alone.
    assert len(hub.requests) == requests


def test_a_cache_that_was_emptied_is_filled_with_the_recorded_commit(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes]
) -> None:
    first = hub.model(NAME).commit(zoo_files)
    hub.model(NAME).commit({**zoo_files, "notes.txt": b"other"})
    assert client.resolved(NAME, revision=first)["commit"] == first


def test_a_cut_download_goes_on_where_it_was_cut(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes]
) -> None:
    # huggingface_hub keeps what it has in steps of 10 MiB.
    step = 10 * 2**20
    weights = random.Random(0).randbytes(2 * step)
    hub.model(NAME).commit({**zoo_files, "model.safetensors": weights})
    hub.faults.append(Fault(WEIGHTS, cut=step + 1000, times=1))
    client.resolved(NAME)
    ranges = [one.headers.get("range") for one in hub.requests if re.search(WEIGHTS, one.line)]
    assert ranges == [None, f"bytes={step}-"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_what_the_hub_names(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], name: str
) -> None:
    """LFS files are named by SHA-256, the others as git names them."""
    content = bytearray(zoo_files[name])
    content[len(content) // 2] ^= 1
    commit = hub.model(NAME).commit({**zoo_files, name: (zoo_files[name], bytes(content))})
    error = client.refused(NAME)
    assert all(word in error for word in (NAME, name, "the Hub names", "run again"))
    # The damaged copy is gone: a sound server is asked again, and believed.
    hub.model(NAME).commits[commit] = zoo_files
    client.resolved(NAME)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/api/models/", 401, {"X-Error-Code": "GatedRepo"}), ["gated", "ask for access"]),
        (Fault("/api/models/", 403, {"X-Error-Code": "GatedRepo"}), ["gated", "HF_TOKEN"]),
        (Fault("/api/models/", 403), ["refused (403)", "hf auth whoami"]),
        (Fault("resolve", 403, {"X-Error-Code": "GatedRepo"}), ["gated", "HF_TOKEN"]),
        (
            Fault("/api/", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            ["refused (401)", "token"],
        ),
        (Fault("/api/models/", 429, {"Retry-After": "4000"}), ["429", "wait 4000 s"]),
        (Fault("/api/models/", 429, {"Retry-After": "0"}), ["429", "run again"]),
        (Fault("/api/models/", 503, {"Retry-After": "0"}), ["fails (503)", "run again later"]),
        (Fault("/api/models/", 418), ["answers 418"]),
    ],
    ids=lambda value: f"{value.status} {value.pattern}" if isinstance(value, Fault) else "",
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], fault: Fault, words: list[str]
) -> None:
    hub.model(NAME).commit(zoo_files)
    hub.faults.append(fault)
    error = client.refused(NAME)
    assert all(word in error for word in ["models", NAME, *words]), error


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/none", "main", ["no such model", "private"]),
        (NAME, "v9", ["at v9", "no such revision"]),
    ],
)
def test_what_is_not_there(
    hub: HubServer,
    client: Client,
    zoo_files: dict[str, bytes],
    name: str,
    revision: str,
    words: list[str],
) -> None:
    hub.model(NAME).commit(zoo_files)
    error = client.refused(name, revision=revision)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("pattern", ["/api/models/.*/revision", "/tree/", WEIGHTS])
def test_a_busy_hub_is_waited_for(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], pattern: str
) -> None:
    """429 and 500, at each kind of request; a pause that the server names is kept."""
    hub.model(NAME).commit(zoo_files)
    hub.faults += [
        Fault(pattern, 429, {"Retry-After": "1"}, times=1),
        Fault(pattern, 500, {"Retry-After": "0"}, times=1),
    ]
    client.resolved(NAME)
    assert len(hub.lines(pattern)) == 3


def test_offline(hub: HubServer, client: Client, zoo_files: dict[str, bytes]) -> None:
    commit = hub.model(NAME).commit(zoo_files)
    error = client.refused(NAME, HF_HUB_OFFLINE="1")
    assert all(word in error for word in (NAME, "not in the cache", "HF_HUB_OFFLINE"))
    online = client.resolved(NAME)
    requests = len(hub.requests)
    assert client.resolved(NAME, HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == requests
    # A Hub that is not there at all.
    error = client.refused("org/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in error
    assert client.resolved(NAME, HF_ENDPOINT="http://127.0.0.1:9") == online
    assert online["commit"] == commit


def test_shards(hub: HubServer, client: Client, zoo_files: dict[str, bytes]) -> None:
    hub.model(NAME).commit(
        {
            **sharded(zoo_files),
            # Other forms of the same weights are left where they are.
            "consolidated.safetensors": b"x",
            "pytorch_model.bin": b"x",
            "onnx/model.safetensors": b"x",
            "modeling.py": b"raise SystemExit",
        }
    )
    found = client.resolved(NAME)
    assert found["weights"] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert not hub.lines(r"resolve/\w+/(consolidated|pytorch|onnx|modeling)")
    hub.model("org/cut").commit(
        {k: v for k, v in sharded(zoo_files).items() if not k.startswith("model-00002")}
    )
    assert "names model-00002-of-00002.safetensors, which is not there" in client.refused("org/cut")


def test_a_plan_fetches_no_weights(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes]
) -> None:
    hub.model(NAME).commit(zoo_files)
    find = "from sparsity_atlas.plan.model_facts import find; import sys\n"
    find += f"print(sorted(path.name for path in find({{'hub': '{NAME}'}}).folder.iterdir()))"
    done = client.run("-c", find)
    assert done.returncode == 0, done.stderr
    assert "tokenizer.json" in done.stdout
    assert not hub.lines("safetensors")


def test_an_adapter_of_the_hub_is_pinned(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes]
) -> None:
    hub.model(NAME).commit(zoo_files)
    files = {"adapter_config.json": b'{"peft_type": "LORA"}', "README.md": b"words"}
    first = {**files, "adapter_model.safetensors": b"1", "adapter_model.bin": b"2"}
    hub.model("org/adapter").commit(first, "main", "v1")
    before = client.resolved(NAME, adapter_hub="org/adapter")["digest"]
    assert not hub.lines(r"README|adapter_model\.bin")
    hub.model("org/adapter").commit({**first, "adapter_model.safetensors": b"3"})
    assert client.resolved(NAME, adapter_hub="org/adapter")["digest"] != before
    pinned = {"adapter_hub": "org/adapter", "adapter_revision": "v1"}
    assert client.resolved(NAME, **pinned)["digest"] == before
    assert "models: adapter: org/none" in client.refused(NAME, adapter_hub="org/none")


def test_one_gguf_file_of_several(hub: HubServer, client: Client) -> None:
    files = {"a.Q4_0.gguf": b"GGUF 4", "more/a.Q8_0.gguf": b"GGUF 8", "config.json": b"{}"}
    hub.model(NAME).commit(files)
    found = client.resolved(NAME, gguf="more/a.Q8_0.gguf")
    assert found["weights"] == ["a.Q8_0.gguf"]
    assert not hub.lines(r"Q4_0|config\.json")
    assert "Q5_0.gguf: no such file" in client.refused(NAME, gguf="a.Q5_0.gguf")


def test_an_index_that_names_files_elsewhere(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes]
) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    hub.model(NAME).commit(
        {**zoo_files, "model.safetensors.index.json": json.dumps(index).encode()}
    )
    error = client.refused(NAME)
    assert "'../../secret.safetensors' is not the name of a file in this folder" in error


def test_pickles_only_where_they_are_allowed(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.model(NAME).commit(pickled(zoo_files, tmp_path))
    error = client.refused(NAME)
    assert "allow_pickle: true" in error
    assert not hub.lines(r"pytorch_model\.bin")
    assert client.resolved(NAME, allow_pickle=True)["weights"] == ["pytorch_model.bin"]
    made = tmp_path / "model.json"
    source = json.dumps({"hub": NAME, "allow_pickle": True})
    done = client.stage("models", "--name", "m", "--source", source, "--output", str(made))
    assert done.returncode == 0, done.stderr
    assert json.loads(made.read_text())["parameters"]["total"] == 836_448


# Code of a repository

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path("ran").write_text("{mark}")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(files: dict[str, bytes], owner: str = "") -> dict[str, bytes]:
    """A model whose architecture is a file of its own repository, or of another one."""
    config = json.loads(files["config.json"])
    config["model_type"] = "own"
    config["architectures"] = ["OwnModel"]
    config["auto_map"] = {
        "AutoConfig": f"{owner}own.OwnConfig",
        "AutoModelForCausalLM": f"{owner}own.OwnModel",
    }
    own = {} if owner else {"own.py": CODE.format(mark="first").encode()}
    return {**files, "config.json": json.dumps(config).encode(), **own}


def describe(client: Client, output: Path, **source: object) -> dict:
    done = client.stage(
        *("models", "--name", "m", "--source", json.dumps({"hub": NAME, **source})),
        *("--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_code_is_not_run_and_nobody_is_asked(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.model(NAME).commit(with_code(zoo_files))
    output = tmp_path / "model.json"
    done = client.stage(
        *("models", "--name", "m", "--source", json.dumps({"hub": NAME})),
        *("--output", str(output)),
    )
    error = one_line(done)
    assert "trust_remote_code: true" in error
    assert not (client.home / "ran").exists()
    assert not hub.lines(r"own\.py")
    assert not output.exists()


def test_trusted_code_is_pinned_and_part_of_the_digest(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    files = with_code(zoo_files)
    commit = hub.model(NAME).commit(files)
    first = describe(client, tmp_path / "1.json", trust_remote_code=True)
    assert (client.home / "ran").read_text() == "first"
    assert first["code"]["revision"] == commit
    assert list(first["code"]["files"]) == ["own.py"]
    hub.model(NAME).commit({**files, "own.py": CODE.format(mark="second").encode()})
    second = describe(client, tmp_path / "2.json", trust_remote_code=True)
    assert (client.home / "ran").read_text() == "second"
    assert first["digest"] != second["digest"]


def test_trusted_code_of_another_repository(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.model(NAME).commit(with_code(zoo_files, "org/code--"))
    commit = hub.model("org/code").commit({"own.py": CODE.format(mark="first").encode()})
    first = describe(client, tmp_path / "1.json", trust_remote_code=True)
    assert first["code"]["repository"] == "org/code"
    assert first["code"]["revision"] == commit
    hub.model("org/code").commit({"own.py": CODE.format(mark="second").encode()})
    pinned = describe(client, tmp_path / "2.json", trust_remote_code=True, code_revision=commit)
    assert pinned["digest"] == first["digest"]
    assert (client.home / "ran").read_text() == "first"
    moved = describe(client, tmp_path / "3.json", trust_remote_code=True)
    assert (client.home / "ran").read_text() == "second"
    assert moved["digest"] != first["digest"]
