"""What every stage's command line shares: logging, and ends in one line."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sparsity_atlas.credentials import HidingStream
from sparsity_atlas.errors import AtlasError

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
}


def run(stage: Callable[[], None]) -> None:
    """Run a stage's `main`.

    A mistake of the user's, a full disk, SIGINT and SIGTERM end in one line and a code other than 0.
    """
    sys.stdout, sys.stderr = HidingStream(sys.stdout), HidingStream(sys.stderr)
    # Progress bars and advice of the libraries would bury our own lines in the log.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        stage()
    except (AtlasError, OSError) as error:
        mistake = what_can_be_mended(error)
        if mistake is None:
            raise
        sys.stderr.write(f"error: {mistake}\n")
        raise SystemExit(1) from None


def what_can_be_mended(error: AtlasError | OSError) -> AtlasError | None:
    """What is told the user in one line; None for an error of our own."""
    if isinstance(error, AtlasError):
        return error
    if error.errno not in _DISK:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return AtlasError(place + _DISK[error.errno])


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
