"""Evaluations that are broken off, and what they leave: what is computed, and which files there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsity_atlas.evaluation.evaluate import Session


class Interrupted(Exception):
    """Raised in place of a batch."""


def watch(session: Session, stop_after: int | None = None) -> list[str]:
    """Note each batch that is computed; break off in place of a further one."""
    calls: list[str] = []

    def wrap(name: str, original: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(calls) == stop_after:
                raise Interrupted
            calls.append(name)
            return original(*arguments, **options)

        return call

    session.lm._model_call = wrap("score", session.lm._model_call)
    session.lm.model.generate = wrap("generate", session.lm.model.generate)
    return calls


def products(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
