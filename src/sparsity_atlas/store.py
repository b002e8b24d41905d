"""Files that are whole or absent: atomic writes, manifests, digests and locks."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsity_atlas.errors import AtlasError

# Version of every file format of ours; a file with a higher one was written by a newer release.
FORMAT = 1


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


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    A reader sees the old file or the new one, and a killed writer leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove the temporary neighbours of `path` whose writers are dead."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except PermissionError:
            continue  # somebody else's process, and alive


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest: JSON that says what it is, last and atomically."""
    text = json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        AtlasError: it is missing, not JSON, or of a newer format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtlasError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AtlasError(f"{path}: damaged manifest ({error}); delete it and run again") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise AtlasError(f"{path}: not a manifest of Sparsity Atlas; delete it and run again")
    if content["format"] > FORMAT:
        raise AtlasError(
            f"{path}: format {content['format']} is newer than this release reads ({FORMAT}); "
            "update sparsity-atlas"
        )
    return content


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if missing); the kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
