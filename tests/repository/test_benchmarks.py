"""What a benchmark names of the package is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_functions_whose_seconds_are_counted_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("host", "measure", "suite"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import host

    counted = []

    class Phases:
        def wrap(self, owner: Any, name: str, phase: str) -> None:
            counted.append((getattr(owner, name), phase))

    host.name_phases(Phases())
    assert len({phase for _, phase in counted}) > 10
