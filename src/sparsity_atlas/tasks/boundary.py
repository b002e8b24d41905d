"""The boundary to code of others: what a task's own code or lm-eval raises is that task's failure.

Such code may raise anything, and may ask Python to exit. What is raised by our own code, also where lm-eval
calls it, stays what it is; so do the ends that are nobody's fault (memory, a full disk, Ctrl-C).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.tasks.error_messages import aggregated, causes, found, library, reason

if TYPE_CHECKING:
    from sparsity_atlas.tasks.modules import OwnModules

_OURS = Path(__file__).parents[1]
# Libraries that run a task for its author; others (NumPy, a tokenizer) work for whoever called them.
_THEIRS = ("lm_eval", "datasets", "jinja2", "evaluate", "generation")
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE}


@contextlib.contextmanager
def boundary(task: str, doing: str, modules: OwnModules) -> Iterator[None]:
    """Run code of a task, with its own modules.

    Args:
        task: its key in the configuration.
        doing: what is not done then, for the message: `cannot be loaded`.
        modules: of the task.

    Raises:
        TaskFailure: in one line what that code raised, with the document if one was in hand. Where it
            happened is logged.
        AtlasError: the same of what the Hub does not give, which it may give the next time.
    """
    try:
        with modules.active():
            yield
    # Foreign code may raise anything, and one task must not take the others with it, by sys.exit() neither.
    except BaseException as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = {str(path) for path in modules.files()}
        if _nobodys(error) or not _is_theirs(frames, own):
            raise
        _log(task, error)
        if isinstance(error, OSError) and _fetches(frames):
            raise AtlasError(f"tasks.{task}: {doing}: {reason(error, frames, own)}") from error
        raise TaskFailure(f"{_where(frames)}{doing}: {reason(error, frames, own)}") from error


def _nobodys(error: BaseException) -> bool:
    """Ours, or the machine's: in the error itself or in one that it was raised from."""
    import torch

    # A stage's own handlers of signals raise nothing: where they are, no Ctrl-C comes as an exception.
    asked = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return any(
        isinstance(one, AtlasError | MemoryError | torch.OutOfMemoryError)
        or (isinstance(one, KeyboardInterrupt) and asked)
        or (isinstance(one, OSError) and one.errno in _PASSING)
        for one in causes(error)
    )


def _is_theirs(frames: list[FrameType], own: set[str]) -> bool:
    """Whose code raised: the innermost that is ours, or the task's or of those who run it."""
    for frame in reversed(frames):
        file = frame.f_code.co_filename
        if _ours(file):
            return False
        if os.path.realpath(file) in own or library(file) in _THEIRS:
            return True
    return False


def _fetches(frames: list[FrameType]) -> bool:
    """Whether a metric of the library `evaluate` was being fetched, as HumanEval's is."""
    return any(
        library(frame.f_code.co_filename) == "evaluate"
        and Path(frame.f_code.co_filename).name == "loading.py"
        for frame in frames
    )


def _ours(file: str) -> bool:
    return Path(file).is_relative_to(_OURS)


def _log(task: str, error: BaseException) -> None:
    """Where it happened, from where the foreign code begins."""
    steps = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    first = next((i for i, (code, _) in enumerate(steps) if not _ours(code.co_filename)), 0)
    cli.logger.info("tasks.%s: where it failed, the innermost place last:", task)
    for code, line in steps[first:]:
        cli.logger.info("  %s:%d in %s", code.co_filename, line, code.co_name)


def _where(frames: list[FrameType]) -> str:
    """The task of a group and the document that lm-eval had in hand."""
    from lm_eval.api.task import Task

    tasks = (frame.f_locals.get("self") for frame in reversed(frames))
    task = next((one for one in tasks if isinstance(one, Task)), None)
    name = getattr(getattr(task, "_config", None), "task", None) or found(frames, "task_name")
    # What stands in an outer loop's variable is the last document, not the one in hand.
    number = found(frames, "doc_id") if aggregated(frames) is None else None
    if number is None and found(frames, "test_doc") is not None:
        number = 0
    parts = [f"'{name}'" if name else "", f"document {number}" if number is not None else ""]
    return "".join(f"{part}: " for part in [", ".join(filter(None, parts))] if part)
