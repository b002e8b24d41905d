"""Errors that a user can mend: printed as one line, without a traceback, with exit code 1."""

from __future__ import annotations


class AtlasError(Exception):
    """Bad input. The message is one line: the file or key, what was found, what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class NumericalFailure(AtlasError):
    """NaN or an infinity where a model computes; the message names the layer."""
