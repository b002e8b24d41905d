"""What code of others raised, in one line that says what to look at: a document, a key, a line of a file."""

from __future__ import annotations

import difflib
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from sparsity_atlas.cli import text_of

_UNKNOWN_KEY = re.compile(r"TaskConfig.*unexpected keyword argument '(.*)'")
# What `datasets` puts around an error of a file's reader.
_WRAPPERS = {"DatasetGenerationError", "DatasetGenerationCastError"}

RUNS_CODE = (
    "runs code that the model writes, with all that you may do on this machine; allow it by "
    "`allow_code: true` in the task's entry, best in a container"
)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def library(file: str) -> str:
    """The package that a file is installed with; transformers' generation counts by itself."""
    parts = Path(file).parts
    if "site-packages" not in parts:
        return ""
    inside = parts[parts.index("site-packages") + 1 :]
    return "generation" if inside[:2] == ("transformers", "generation") else inside[0]


def found(frames: list[FrameType], name: str) -> Any:
    """A variable of lm-eval's innermost frame that has it."""
    for frame in reversed(frames):
        if library(frame.f_code.co_filename) == "lm_eval" and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def reason(error: BaseException, frames: list[FrameType], own: set[str]) -> str:
    """What foreign code raised, in one line that says what to look at.

    Args:
        error: what was raised.
        frames: that it came through, the innermost last.
        own: paths of the task's own Python files.
    """
    *_, innermost = causes(error)
    if type(error).__name__ in _WRAPPERS or not text_of(error).strip():
        error = innermost
    elif isinstance(error, TypeError) and isinstance(error.__context__, TypeError):
        # lm-eval calls a metric in a second way where the first fails; the first says why.
        error = error.__context__
    text = _known(error, frames) or _key_of_yaml(error, frames)
    if text is None:
        lines = [
            line.strip() for line in text_of(error).splitlines() if any(map(str.isalnum, line))
        ]
        text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return _step(frames) + text + _place(error, own)


def aggregated(frames: list[FrameType]) -> str | None:
    """The metric that lm-eval was aggregating over documents."""
    inside = any(frame.f_code.co_name == "_compute_task_aggregations" for frame in frames)
    return found(frames, "metric") if inside else None


def _step(frames: list[FrameType]) -> str:
    """The key of the YAML whose work it was, where lm-eval keeps that work apart."""
    if (metric := aggregated(frames)) is not None:
        return f"metric_list: the aggregation of '{metric}': "
    files = (Path(frame.f_code.co_filename).parts[-3:-1] for frame in frames)
    return "filter_list: " if ("lm_eval", "filters") in files else ""


def _key_of_yaml(error: BaseException, frames: list[FrameType]) -> str | None:
    """Values of the YAML that lm-eval takes without a look, and stumbles over."""
    methods = ("doc_to_text", "doc_to_target", "doc_to_choice")
    frame = next((one for one in reversed(frames) if one.f_code.co_name in methods), None)
    if frame is not None and library(frame.f_code.co_filename) == "lm_eval":
        key, value = frame.f_code.co_name, frame.f_locals.get(frame.f_code.co_name)
        if isinstance(error, TypeError) and not text_of(error) and frame is frames[-1]:
            seen = "nothing" if value is None else type(value).__name__
            return f"{key}: expected a template, a field or a function, found {seen}"
        read = any(one.f_code.co_name == "literal_eval" for one in frames)
        if isinstance(error, SyntaxError | ValueError) and key == "doc_to_choice" and read:
            return f"doc_to_choice: expected a template that gives a list, found '{value}'"
    last = frames[-1].f_locals if frames else {}
    options = last.get("test_choice")
    if isinstance(options, list) and not all(isinstance(one, str) for one in options):
        return f"doc_to_choice: expected texts, found {options}"
    if isinstance(options, list) and "" in options and isinstance(error, IndexError):
        return "doc_to_choice: an option is empty"
    document = found(frames, "doc")
    if isinstance(error, TypeError) and "NoneType" in text_of(error) and isinstance(document, dict):
        empty = [str(name) for name, value in document.items() if value is None]
        if empty:
            return f"TypeError: {text_of(error)}; the document has nothing in {', '.join(empty)}"
    return None


def _known(error: BaseException, frames: list[FrameType]) -> str | None:
    """The errors that say too little by themselves."""
    from lm_eval.config.task import TaskConfig

    document = found(frames, "doc") or found(frames, "test_doc")
    last = frames[-1].f_locals if frames else {}
    if "HF_ALLOW_CODE_EVAL" in text_of(error):
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
    if isinstance(error, TypeError) and (key := _UNKNOWN_KEY.search(text_of(error))):
        known = (one.name for one in fields(TaskConfig))
        return f"its YAML has a key that lm-eval does not know: '{key[1]}'{close(key[1], known)}"
    if "Sample larger than population" in text_of(error) and found(frames, "n"):
        pool = next(
            (one for frame in frames if hasattr(one := frame.f_locals.get("self"), "df")), None
        )
        there = len(pool.df) if pool is not None else "fewer"
        beside = ", the document itself among them" if found(frames, "eval_doc") else ""
        return (
            f"num_fewshot: {found(frames, 'n')} examples are wanted, and there are {there}{beside}"
        )
    if isinstance(error, SyntaxError) and error.filename not in (None, "<unknown>"):
        return f"SyntaxError: {error.msg}"
    if isinstance(error, IndexError) and isinstance(last.get("test_target"), int):
        return f"label {last['test_target']}, and there are {len(last['test_choice'])} options"
    if library(frames[-1].f_code.co_filename) == "datasets" and (
        isinstance(error, StopIteration)
        or (isinstance(error, IndexError) and "size 0" in text_of(error))
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
    if isinstance(error, SyntaxError) and error.filename not in (None, "<unknown>"):
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
    readers = [one for one in frames if library(one.f_code.co_filename) == "datasets"]
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
