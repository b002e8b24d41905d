"""What every stage's command line shares: logging, and ends in one line."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sparsity_atlas.credentials import HidingStream
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.garbage import look_hardly

logger = logging.getLogger("sparsity_atlas")
# What a signal has done before it ends the process; `files.whole` adds to it.
before_stop: list[Callable[[], None]] = []

# httpx notes every URL, and a download's URL may be signed.
_CHATTY = ("transformers", "datasets", "lm_eval", "lm-eval", "httpx", "httpx2", "huggingface_hub")
# Errors of the disk, which the user can mend.
_DISK = {
    errno.ENOSPC: "no space is left on the disk; make room and run again",
    errno.EDQUOT: "the disk quota is used up; make room and run again",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "not permitted",
    errno.EIO: "the disk reports an input/output error",
    errno.EISDIR: "it is a folder, where a file was expected",
    errno.ENOTDIR: "it lies in what is no folder",
    errno.ELOOP: "a link that leads to itself",
}
_PACKAGE = Path(__file__).parent
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def run(stage: Callable[[], None]) -> None:
    """Run a stage's `main`.

    A mistake of the user's or of his own code, a full disk, no memory, SIGINT and SIGTERM end in one line
    and a code other than 0.
    """
    look_hardly()
    sys.stdout, sys.stderr = HidingStream(sys.stdout), HidingStream(sys.stderr)
    # Progress bars and advice of the libraries would bury our own lines in the log.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Which sets its own level again when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        stage()
    # A user's own code may raise anything, also SystemExit(0), which would pass for success.
    except BaseException as error:
        mistake = what_can_be_mended(error)
        if mistake is None:
            raise
        sys.stderr.write(f"error: {mistake}\n")
        raise SystemExit(1) from None


def what_can_be_mended(error: BaseException) -> AtlasError | None:
    """What is told the user in one line; None for an error of our own."""
    if isinstance(error, AtlasError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f"{error.filename}: " if error.filename else ""
        return AtlasError(place + _DISK[error.errno])
    # torch's is no MemoryError, and torch is not imported for it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return AtlasError(f"not enough memory ({said(error)}); a smaller batch_size needs less")
    return _of_own_code(error)


def _of_own_code(error: BaseException) -> AtlasError | None:
    """What code of the user's raised (a criterion, a model's own Python); None if it was not such code."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            return None
        if file.is_file() and not any(file.is_relative_to(folder) for folder in _INSTALLED):
            return AtlasError(f"{file}, line {line}: {type(error).__name__}: {said(error)}")
    return None


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(filter(None, map(str.strip, text_of(error).splitlines())), "no message")


def text_of(error: BaseException) -> str:
    """All that an error says; that of somebody's code may fail at that, too."""
    return str(traceback.TracebackException(type(error), error, None))


def _stop(number: int, frame: FrameType | None) -> None:
    """End in one line; a second signal, which Snakemake sends after Ctrl-C, changes nothing.

    At once: an exception would be dropped by a destructor, and one that comes out of Python into a
    library's own code (an import, most of all) aborts the process. What is on the disk can take it, as
    it can take a SIGKILL.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    for leave in before_stop:
        leave()
    name = signal.Signals(number).name
    # Not through sys.stderr, which this signal may have interrupted in the middle of a write.
    os.write(2, f"error: stopped by {name}; the same command goes on from here\n".encode())
    os._exit(128 + number)


def optional_path(text: str) -> Path | None:
    """A path, or None for the empty string that an absent input leaves."""
    return Path(text) if text else None


def folder_of(path: Path) -> Path:
    """The folder of an output, made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
