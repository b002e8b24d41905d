"""What a row of times says of the machine."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.speed import machine as module
from sparsity_atlas.speed.machine import alone, machine

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = "53a06ed6-0000-4000-8000-000000000001"


def test_a_cpu_by_its_name_threads_and_libraries() -> None:
    found = machine("cpu")
    assert found["device"].endswith(", 1 thread")
    assert found["driver"] == ""
    assert f"torch {torch.__version__}, numba " in found["versions"]


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", version)
    with pytest.raises(AtlasError, match="speed: device: cpu: numba is not installed"):
        machine("cpu")


@pytest.mark.parametrize(("code", "driver"), [(0, "580.1, 1980 MHz, 3201 MHz"), (6, "")])
def test_a_gpu_is_asked_for_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, driver: str
) -> None:
    """Its number is another one where the process may not see those before it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\nprintf "%s " "$@" > {tmp_path}/asked\necho "580.1, 1980 MHz, 3201 MHz"\nexit {code}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid=OWN))
    monkeypatch.setattr(module.metadata, "version", lambda name: "3.6")
    found = machine("cuda")
    assert (found["device"], found["driver"]) == ("a card", driver)
    assert found["versions"].startswith(f"torch {torch.__version__}, triton 3.6")
    assert f"--id=GPU-{OWN} " in (tmp_path / "asked").read_text()


def test_of_two_jobs_that_time_one_waits_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered, said = threading.Event(), threading.Event()

    def other() -> None:
        with alone(tmp_path):
            entered.set()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    heard = Heard()
    cli.logger.addHandler(heard)
    waiting = threading.Thread(target=other, daemon=True)
    try:
        with caplog.at_level("INFO", logger=cli.logger.name), alone(tmp_path):
            assert "waiting" not in caplog.text
            waiting.start()
            assert said.wait(30)
            assert not entered.wait(0.1)
            assert "another job measures times on this machine; waiting" in caplog.text
        assert entered.wait(30)
    finally:
        cli.logger.removeHandler(heard)
    waiting.join(30)


def test_a_job_that_fails_leaves_the_machine(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="nothing"), alone(tmp_path):
        raise AtlasError("nothing")
    with alone(tmp_path):
        pass
