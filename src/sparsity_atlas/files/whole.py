"""Files that are whole or absent: atomic writes, manifests, digests and locks."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError

# Version of every file format of ours; a file with a higher one was written by a newer release.
FORMAT = 1
# Bytes; a hundred times the largest manifest or index of weights.
LARGEST_JSON = 256 * 2**20


def canonical(value: Any) -> str:
    """JSON with one spelling for each value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# Above this size a digest is remembered: hashing a large model takes as long as loading it.
REMEMBER_BYTES = 64 * 2**20


def cache_folder(name: str) -> Path:
    """A folder of ours in the user's cache, for what is only kept to save time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparsity-atlas", name)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits.

    A large file's digest is kept in the user's cache folder for as long as the file's size, time
    stamp and inode are the same.
    """
    state = path.stat()
    if state.st_size < REMEMBER_BYTES:
        return _hash(path)
    identity = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    memory = cache_folder("digests") / hashlib.sha256(identity.encode()).hexdigest()
    known = memory.read_text() if memory.is_file() else ""
    if len(known) == 64:
        return known
    value = _hash(path)
    write_text(memory, value)
    return value


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_unfinished: set[Path] = set()


def discard_unfinished() -> None:
    """Remove the temporary files that this process is writing, before it ends without going on."""
    for temporary in list(_unfinished):
        temporary.unlink(missing_ok=True)


cli.before_stop.append(discard_unfinished)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    A reader sees the old file or the new one, and a killed writer leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{machine()}.tmp")
    _unfinished.add(temporary)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def machine() -> str:
    """This machine's name, short and without dots: process ids mean nothing on another one."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sweep(path: Path) -> None:
    """Remove the temporary neighbours of `path` whose writers are dead."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if abandoned(left):
            left.unlink(missing_ok=True)


def _writer(temporary: Path) -> int | None:
    """Process that wrote a temporary file of ours; None if it ran on another machine."""
    writer, _, where = temporary.name.split(".")[-2].partition("@")
    return int(writer) if writer.isdigit() and where == machine() else None


def abandoned(temporary: Path, *, elsewhere: float = math.inf) -> bool:
    """Whether the writer of a temporary file of ours is dead.

    Args:
        temporary: the file.
        elsewhere: seconds after which one is taken for dead that ran on another machine, of whose
            processes nothing can be told here.
    """
    writer = _writer(temporary)
    if writer is None:
        return time.time() - temporary.stat().st_mtime > elsewhere
    try:
        os.kill(writer, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # somebody else's process, and alive
    return False


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest: JSON that says what it is and has a checksum, last and atomically."""
    content = {"format": FORMAT, **content}
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def _checksum(content: dict[str, Any]) -> str:
    """Of a manifest as it will be read: JSON has no tuples, and text as keys."""
    return digest(json.loads(json.dumps(content, allow_nan=False)))[:16]


def read_json(path: Path) -> Any:
    """Read a JSON file, which may be somebody else's.

    Raises:
        AtlasError: it is missing, not JSON, or too large or too deeply nested to be what it should be.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise AtlasError(f"{path}: {size:,} bytes; at most {LARGEST_JSON:,} are read as JSON")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtlasError(f"{path}: no such file") from None
    # Of the ValueErrors: not UTF-8, not JSON, and a number of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise AtlasError(f"{path}: not JSON ({error})") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        AtlasError: it is missing, not JSON, of a newer format, or not as it was written.
    """
    try:
        content = read_json(path)
    except AtlasError as error:
        if not path.is_file():
            raise
        reason = str(error).removeprefix(f"{path}: ")
        raise AtlasError(f"{path}: damaged manifest ({reason}); delete it and run again") from None
    written = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(written, int):
        raise AtlasError(f"{path}: not a manifest of Sparsity Atlas; delete it and run again")
    if written > FORMAT:
        raise AtlasError(
            f"{path}: format {written} is newer than this release reads ({FORMAT}); "
            "update sparsity-atlas"
        )
    checksum = content.pop("checksum", None)
    try:
        sound = checksum == _checksum(content)
    except ValueError:  # it has a NaN, which no manifest of ours has
        sound = False
    if not sound:
        raise AtlasError(
            f"{path}: damaged manifest (its checksum is not that of its content); "
            "delete it and run again"
        )
    return content


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if missing); the kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def free(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock on `path`; nobody gets it as long as this lasts."""
    if not path.is_file():
        yield True
        return
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
