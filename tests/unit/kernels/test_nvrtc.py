"""What was compiled is compiled once, by whichever process needs it first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sparsity_atlas.files.whole import cache_folder
from sparsity_atlas.kernels import nvrtc

TEXT, NAME, DEFINED, HOPPER, VERSION = b"kernel", "share.cu", {"TYPE": 0}, "sm_90", (13, 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """Calls of the compiler, in whose place another one is."""
    made: list[tuple[object, ...]] = []

    def compiled(text: bytes, name: str, defined: Mapping[str, int], architecture: str) -> bytes:
        made.append((text, name, dict(defined), architecture))
        return f"code {len(made)}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compiled", compiled)
    return made


def test_the_same_is_compiled_once(calls: list[tuple[object, ...]]) -> None:
    for _ in range(2):
        assert nvrtc.kept(TEXT, NAME, DEFINED, HOPPER, VERSION) == b"code 1"
    assert calls == [(TEXT, NAME, DEFINED, HOPPER)]


@pytest.mark.parametrize(
    "other",
    [
        (b"another kernel", NAME, DEFINED, HOPPER, VERSION),
        (TEXT, NAME, {"TYPE": 1}, HOPPER, VERSION),
        (TEXT, NAME, DEFINED, "sm_100", VERSION),
        (TEXT, NAME, DEFINED, HOPPER, (13, 1)),
    ],
)
def test_anything_else_is_compiled_anew(
    calls: list[tuple[object, ...]],
    other: tuple[bytes, str, dict[str, int], str, tuple[int, int]],
) -> None:
    nvrtc.kept(TEXT, NAME, DEFINED, HOPPER, VERSION)
    assert nvrtc.kept(*other) == b"code 2"
    assert len(calls) == 2


def test_what_is_broken_is_compiled_anew(calls: list[tuple[object, ...]]) -> None:
    nvrtc.kept(TEXT, NAME, DEFINED, HOPPER, VERSION)
    (file,) = cache_folder("cuda").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert nvrtc.kept(TEXT, NAME, DEFINED, HOPPER, VERSION) == b"code 2"
    assert nvrtc.kept(TEXT, NAME, DEFINED, HOPPER, VERSION) == b"code 2"
