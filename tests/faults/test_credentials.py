"""Tokens and passwords appear in nothing that is written or shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkout import Checkout, hub_fork_server, smoke_config
from faults.conftest import Client
from hub_server import Fault, HubServer
from sparsity_atlas import credentials
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError

CANARY = "hf_CanaryCanaryCanaryCanary"
PASSWORD = "canary-password"
NAME = "org/small"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no secret at all: a@b, x://y/z@w", "no secret at all: a@b, x://y/z@w"),
        (f"token {CANARY}.", "token ***."),
        (f"http://me:{PASSWORD}@host/a", "http://***@host/a"),
        (f"GET 'https://{CANARY}@host/a?b=c@d'", "GET 'https://***@host/a?b=c@d'"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic ***'}"),
        ("my own secret-value is here", "my own *** is here"),
    ],
)
def test_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    credentials._known.cache_clear()
    assert credentials.hide(text) == shown
    assert str(AtlasError(text)) == shown
    monkeypatch.delenv("HF_TOKEN")
    credentials._known.cache_clear()


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"override": {"dataset_kwargs": {"token": CANARY}}}, "tasks.pairs.override"),
        ({"override": {"dataset_path": f"https://me:{PASSWORD}@host/x"}}, "tasks.pairs.override"),
        ({"override": {CANARY: 1}}, "tasks.pairs.override"),
        ({"include": [f"http://{PASSWORD}@h"]}, "tasks.pairs.include.0"),
    ],
)
def test_a_configuration_is_written_to_the_results_and_may_hold_none(
    entry: dict[str, Any], place: str
) -> None:
    with pytest.raises(AtlasError, match=f"^config: {place}.*password or token") as caught:
        parse({"tasks": {"pairs": entry}})
    assert CANARY not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def secrets(hub: HubServer) -> dict[str, str]:
    """Environment with a token, and an endpoint with a password."""
    return {"HF_TOKEN": CANARY, "HF_ENDPOINT": f"http://me:{PASSWORD}@{hub.netloc}"}


FAULTS = [
    None,
    Fault("/api/models", 401, {"X-Error-Message": f"Invalid token {CANARY}"}),
    Fault("/api/models", 403, {"X-Error-Code": "GatedRepo"}),
    Fault("/api/models", 404, {"X-Error-Code": "RevisionNotFound"}),
    Fault("/api/models", 500, {"Retry-After": "0"}, body=CANARY.encode()),
    Fault("tree", 400, body=f'{{"error": "{CANARY}"}}'.encode()),
    Fault("GET .*safetensors", 410, body=CANARY.encode()),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault and fault.status))
def test_fetching(
    hub: HubServer, client: Client, zoo_files: dict[str, bytes], fault: Fault | None
) -> None:
    hub.model(NAME).commit(zoo_files)
    hub.faults += [fault] if fault else []
    done = client.resolve(NAME, **secrets(hub))
    assert done.returncode == (1 if fault else 0)
    assert any("authorization" in one.headers for one in hub.requests)
    for text in (done.stdout, done.stderr):
        assert CANARY not in text
        assert PASSWORD not in text


def test_a_traceback_of_an_unexpected_error(client: Client) -> None:
    code = "from sparsity_atlas import cli\n"
    code += "def main():\n    print('x')\n    raise RuntimeError('http://me:' + 'canary-password@host')\n"
    done = client.run("-c", code + "cli.run(main)")
    assert done.returncode == 1
    assert "RuntimeError: http://***@host" in done.stderr
    assert PASSWORD not in done.stderr


def test_a_run_with_a_model_that_is_fetched_and_one_that_is_refused(
    hub: HubServer, zoo_files: dict[str, bytes], tmp_path: Path
) -> None:
    """Results, logs, benchmarks, the report and Snakemake's own records are searched."""
    hub.model(NAME).commit(zoo_files)
    hub.faults.append(Fault("/api/models/org/gated", 403, {"X-Error-Code": "GatedRepo"}))
    checkout = Checkout.make(tmp_path / "atlas")
    config = smoke_config()
    config["models"] = {"fetched": {"hub": NAME}, "refused": {"hub": "org/gated"}}
    config["run"] = [
        {
            **{"models": ["fetched", "refused"], "criteria": ["topk"], "sites": ["input"]},
            **{"levels": [0.5], "tasks": ["few_pairs"]},
        }
    ]
    done = checkout.run(
        config=config,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        FORK_SERVER=hub_fork_server(),
        **secrets(hub),
    )
    assert done.returncode == 1
    page = (checkout.results / "index.html").read_text()
    assert "org/gated" in page
    assert "it is gated; ask for access" in page
    assert (checkout.results / "fetched/topk/input/curve.json").is_file()
    assert json.loads((checkout.results / "fetched/model.json").read_text())["revision"]
    searched = 0
    for folder, _, names in os.walk(checkout.path):
        for name in names:
            content = Path(folder, name).read_bytes()
            assert CANARY.encode() not in content, Path(folder, name)
            assert PASSWORD.encode() not in content, Path(folder, name)
            searched += 1
    assert searched > 100
    assert CANARY not in done.stdout
    assert PASSWORD not in done.stdout
