"""Errors that a user can mend: printed as one line, without a traceback, with exit code 1."""

from __future__ import annotations

from sparsity_atlas.credentials import hide

_LONGEST = 2000


class AtlasError(Exception):
    """Bad input. The message is one line: the file or key, what was found, what would be right.

    What it quotes is somebody else's text: credentials are hidden, control characters (which a terminal
    would obey) replaced, and a text without end is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class NumericalFailure(AtlasError):
    """NaN or an infinity where a model computes; the message names the layer."""


class UnknownTokens(AtlasError):
    """A forward pass in which it cannot be told which row of a tensor belongs to which token."""


class TaskFailure(AtlasError):
    """A task that cannot be run, at all or on one model: its result, which the other tasks do not share."""


def one_line(text: str) -> str:
    """A text as one line that may be shown."""
    line = " ".join(hide(str(text)).split())
    shown = "".join(
        sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line[:_LONGEST]
    )
    return shown if len(line) <= _LONGEST else f"{shown} ..."
