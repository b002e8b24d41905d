"""Tokens and passwords, kept out of everything that is written or shown."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

HIDDEN = "***"

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]+(?=@)")
# A header as a library prints it: `Authorization: Bearer x`, `'authorization': 'Basic x'`.
_HEADER = re.compile(r"(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{8,}")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# A shorter value could be a part of any word.
_SHORTEST = 8


def hide(text: str) -> str:
    """A text without the credentials in it: Hub tokens, and user and password of URLs."""
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _USERINFO.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


@functools.cache
def _known() -> tuple[str, ...]:
    """This machine's own Hub tokens, whatever they look like."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token"))
    values = [os.environ.get(name, "") for name in _VARIABLES]
    if file.is_file():
        values.append(file.read_text(encoding="utf-8", errors="replace"))
    return tuple(value.strip() for value in values if len(value.strip()) >= _SHORTEST)


def places(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the strings of a JSON-like value that hold a credential."""
    if isinstance(value, str):
        if hide(value) != value:
            yield path
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from places(one, f"{path}.{hide(str(key))}".lstrip("."))
            yield from ([f"{path}: a key"] if hide(str(key)) != str(key) else [])
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from places(one, f"{path}.{number}".lstrip("."))


class HidingStream:
    """A text stream that hides credentials in what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; the length is that of what was given, as for any stream."""
        self._stream.write(hide(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
