"""The boundary to code of others: what a task's own code or lm-eval raises is that task's failure.

Such code may raise anything. What is raised by our own code, also where lm-eval calls it, stays what it
is; so do the ends that are nobody's fault (memory, a full disk, Ctrl-C).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, TaskFailure

if TYPE_CHECKING:
    from sparsity_atlas.tasks.modules import OwnModules

_OURS = Path(__file__).parents[1]
# Libraries that run a task for its author; others (NumPy, a tokenizer) work for whoever called them.
_THEIRS = ("lm_eval", "datasets", "jinja2", "evaluate", "generation")
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE}
_UNKNOWN_KEY = re.compile(r"TaskConfig.*unexpected keyword argument '(.*)'")
# What `datasets` puts around an error of a file's reader.
_WRAPPERS = {"DatasetGenerationError", "DatasetGenerationCastError"}


RUNS_CODE = (
    "runs code that the model writes, with all that you may do on this machine; allow it by "
    "`allow_code: true` in the task's entry, best in a container"
)


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
    """
    try:
        with modules.active():
            yield
    # Foreign code may raise anything, and one task must not take the others with it.
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = {str(path) for path in modules.files()}
        if _nobodys(error) or not _is_theirs(frames, own):
            raise
        _log(task, error)
        raise TaskFailure(f"{_where(frames)}{doing}: {reason(error, frames, own)}") from error


def _nobodys(error: BaseException) -> bool:
    """Ours, or the machine's: in the error itself or in one that it was raised from."""
    import torch

    return any(
        isinstance(one, AtlasError | MemoryError | torch.OutOfMemoryError)
        or (isinstance(one, OSError) and one.errno in _PASSING)
        for one in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_theirs(frames: list[FrameType], own: set[str]) -> bool:
    """Whose code raised: the innermost that is ours, or the task's or of those who run it."""
    for frame in reversed(frames):
        file = frame.f_code.co_filename
        if _ours(file):
            return False
        if os.path.realpath(file) in own or _library(file) in _THEIRS:
            return True
    return False


def _ours(file: str) -> bool:
    return Path(file).is_relative_to(_OURS)


def _library(file: str) -> str:
    """The package that a file is installed with; transformers' generation counts by itself."""
    parts = Path(file).parts
    if "site-packages" not in parts:
        return ""
    inside = parts[parts.index("site-packages") + 1 :]
    return "generation" if inside[:2] == ("transformers", "generation") else inside[0]


def _log(task: str, error: BaseException) -> None:
    """Where it happened, from where the foreign code begins."""
    steps = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    first = next((i for i, (code, _) in enumerate(steps) if not _ours(code.co_filename)), 0)
    cli.logger.info("tasks.%s: where it failed, the innermost place last:", task)
    for code, line in steps[first:]:
        cli.logger.info("  %s:%d in %s", code.co_filename, line, code.co_name)


def _found(frames: list[FrameType], name: str) -> Any:
    """A variable of lm-eval's innermost frame that has it."""
    for frame in reversed(frames):
        if _library(frame.f_code.co_filename) == "lm_eval" and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def _where(frames: list[FrameType]) -> str:
    """The task of a group and the document that lm-eval had in hand."""
    from lm_eval.api.task import Task

    tasks = (frame.f_locals.get("self") for frame in reversed(frames))
    task = next((one for one in tasks if isinstance(one, Task)), None)
    name = getattr(getattr(task, "_config", None), "task", None) or _found(frames, "task_name")
    number = _found(frames, "doc_id")
    if number is None and _found(frames, "test_doc") is not None:
        number = 0
    parts = [f"'{name}'" if name else "", f"document {number}" if number is not None else ""]
    return "".join(f"{part}: " for part in [", ".join(filter(None, parts))] if part)


def reason(error: BaseException, frames: list[FrameType], own: set[str]) -> str:
    """What foreign code raised, in one line that says what to look at.

    Args:
        error: what was raised.
        frames: that it came through, the innermost last.
        own: paths of the task's own Python files.
    """
    *_, innermost = causes(error)
    if type(error).__name__ in _WRAPPERS or not str(error).strip():
        error = innermost
    text = _known(error, frames)
    if text is None:
        lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line))]
        text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text + _place(error, own)


def _known(error: BaseException, frames: list[FrameType]) -> str | None:
    """The errors that say too little by themselves."""
    from lm_eval.config.task import TaskConfig

    document = _found(frames, "doc") or _found(frames, "test_doc")
    last = frames[-1].f_locals if frames else {}
    if "HF_ALLOW_CODE_EVAL" in str(error):
        return f"it {RUNS_CODE}"
    if isinstance(error, KeyError):
        key = error.args[0] if error.args else None
        if "alias" in last and hasattr(last.get("self"), "_objs"):
            registry = last["self"]
            return f"lm-eval has no {registry._name} '{last['alias']}'" + close(
                last["alias"], registry
            )
        if type(last.get("self")).__name__ == "DatasetDict":
            return f"its data have no split '{key}'; they have {', '.join(last['self'])}"
        if isinstance(document, dict) and isinstance(key, str) and key not in document:
            return f"the document has no field '{key}'; it has {', '.join(map(str, document))}"
        return f"KeyError: {key!r}"
    if type(error).__name__ == "UndefinedError" and isinstance(document, dict):
        return f"template: {error}; a document has {', '.join(map(str, document))}"
    if isinstance(error, TypeError) and (key := _UNKNOWN_KEY.search(str(error))):
        known = (one.name for one in fields(TaskConfig))
        return f"its YAML has a key that lm-eval does not know: '{key[1]}'{close(key[1], known)}"
    if "Sample larger than population" in str(error) and _found(frames, "n"):
        pool = next(
            (one for frame in frames if hasattr(one := frame.f_locals.get("self"), "df")), None
        )
        there = len(pool.df) if pool is not None else "fewer"
        return f"num_fewshot: {_found(frames, 'n')} examples are wanted, and there are {there}"
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    if isinstance(error, IndexError) and "test_choice" in last:
        return f"label {last['test_target']}, and there are {len(last['test_choice'])} options"
    if _library(frames[-1].f_code.co_filename) == "datasets" and (
        isinstance(error, StopIteration)
        or (isinstance(error, IndexError) and "size 0" in str(error))
    ):
        return "it has no documents"
    return None


def close(name: Any, known: Iterable[str]) -> str:
    """What somebody may have meant, to be put behind a message."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        return f"; close names: {', '.join(near)}"
    return f"; known: {', '.join(sorted(known))}" if 0 < len(known) <= 30 else ""


def _place(error: BaseException, own: set[str]) -> str:
    """Where in the task's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    steps = traceback.walk_tb(error.__traceback__)
    places = [(os.path.realpath(frame.f_code.co_filename), line) for frame, line in steps]
    inside = [(file, line) for file, line in places if file in own]
    if not inside:
        return _data_place(error)
    return f" ({Path(inside[-1][0]).name}, line {inside[-1][1]})"


def _data_place(error: BaseException) -> str:
    """Where in a file of data, if a reader of `datasets` had one in hand."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    readers = [one for one in frames if _library(one.f_code.co_filename) == "datasets"]
    files = [one.f_locals["file"] for one in readers if isinstance(one.f_locals.get("file"), str)]
    if not files or not os.path.isfile(files[-1]):
        return ""
    path = Path(files[-1])
    with path.open(encoding="utf-8", errors="replace") as lines:
        wrong = (number for number, line in enumerate(lines, 1) if not _is_json(line))
        number = next(wrong, None) if "json" in path.suffix else None
    return f" ({path.name}{f', line {number}' if number else ''})"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return not line.strip()
    return True
