"""What is said, in one line, where a folder's files or code cannot be made a model or a tokenizer."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_json
from sparsity_atlas.loading.checkpoint import PICKLE_INDEX, SAFE_INDEX, Checkpoint
from sparsity_atlas.loading.contents import small_fault

# The last line of a traceback: the class of the exception and what it says.
_RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+): (.+)$", re.MULTILINE)


@contextmanager
def one_line(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while somebody's files and code are loaded into one line.

    Raises:
        AtlasError: says what failed and why.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise AtlasError(f"{_damaged(checkpoint)}: damaged safetensors file ({error})") from None
    except (KeyboardInterrupt, AtlasError):
        raise
    except BaseException as error:  # noqa: BLE001 (a repository's own code may raise anything)
        reason = _of_files(checkpoint, error) or _of_tensors(error) or _reason(error)
        raise AtlasError(f"{checkpoint}: {what}: {reason}") from None


def _damaged(checkpoint: Checkpoint) -> Path | Checkpoint:
    """The file that safetensors cannot open, which it does not name; the checkpoint if it opens all."""
    from safetensors import SafetensorError, safe_open

    for path in checkpoint.weight_files():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path
    return checkpoint


def _of_tensors(error: BaseException) -> str | None:
    """What could not be made of the files' tensors, as one of all experts is; None: nothing of the kind.

    transformers writes it into a report for its log, and raises an error that only names the report.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    values = (value for frame in frames for value in tuple(frame.f_locals.values()))
    reports = (one for one in values if isinstance(one, LoadStateDictInfo))
    faults = next((one.conversion_errors for one in reports if one.conversion_errors), None)
    if faults is None:
        return None
    name, entry = min(faults.items())
    # A traceback, what was raised once more, and which step it was in.
    raised = _RAISED.search(entry[entry.rfind("\n  ") + 1 :])
    reason = raised[2] if raised else entry.strip().splitlines()[0]
    others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{name} cannot be made of the tensors in its files: {reason}{others}"


def _of_files(checkpoint: Checkpoint, error: BaseException) -> str | None:
    """What is wrong with one of the files that a model or a tokenizer is read from; None if nothing is.

    Whoever reads them says what he found, and not in which file.
    """
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "its *.bin is damaged, or holds objects that are no tensors, which are not loaded"
    own = checkpoint.folder if checkpoint.gguf is None else None
    for folder in (checkpoint.tokenizer, own):
        fault = (small_fault(folder) or _no_tokenizer(folder)) if folder is not None else None
        if fault is not None:
            return fault
    for name in (SAFE_INDEX, PICKLE_INDEX):
        path = checkpoint.folder / name
        if (
            own is not None
            and path.is_file()
            and not isinstance(read_json(path).get("metadata"), dict)
        ):
            return f"{name}: expected 'metadata', which may be {{}}, beside 'weight_map'"
    named = error.args[0] if isinstance(error, KeyError) and error.args else None
    keys = [key for key, value in checkpoint.settings() if value == named] if named else []
    return f"config.json: {keys[0]}: unknown '{named}'" if keys else None


def _no_tokenizer(folder: Path) -> str | None:
    """Why a folder's tokenizer.json is none; None if it is one, or there is no such file."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises no other class)
        return f"{path.name}: not a tokenizer: {error}"
    return None


def _reason(error: BaseException) -> str:
    text = cli.text_of(error).strip()
    if "trust_remote_code" in text:
        return (
            "it is defined by Python code of its repository, which is not run; read that code, and "
            "if you trust it, say trust_remote_code: true in the model's entry"
        )
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return "expected tokenizer.json, or the files of its tokenizer_class, found none"
    if text.startswith("Unrecognized configuration class") and "AutoModelForCausalLM" in text:
        return "it is no causal language model, and only these can be evaluated"
    first, cause = _first(error, text), error.__cause__
    beneath = _first(cause, cli.text_of(cause).strip()) if cause is not None else ""
    return first if beneath in text else f"{first} ({beneath})"


def _first(error: BaseException, text: str) -> str:
    """The first line of what an error says, with its class where that alone says little."""
    lines = [line.strip() for line in text.splitlines()] or [""]
    # Validators put the key on the first line, and what is wrong with it on the next.
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # Of others: a KeyError's is the key.
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
