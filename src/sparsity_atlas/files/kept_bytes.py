"""Files in the user's cache, which only save time: whole or as if absent, and gone when nobody uses them.

A file's name is the digest of all that its content depends on; it begins with a digest of its own bytes.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from sparsity_atlas import cli
from sparsity_atlas.files.whole import cache_folder, digest, write_atomically

_DIGEST_BYTES = hashlib.sha256().digest_size
UNUSED_DAYS = 30


def kept_path(folder: str, made_of: Any, suffix: str) -> Path:
    """Where something is kept.

    Args:
        folder: within the user's cache.
        made_of: JSON-able, all that it depends on.
        suffix: of the file's name.
    """
    return cache_folder(folder) / f"{digest(made_of)}{suffix}"


def read_kept(path: Path) -> bytes | None:
    """What was kept there; None if there is nothing that is whole."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    payload = content[_DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == content[:_DIGEST_BYTES] else None


def keep(path: Path, payload: bytes, what: str) -> None:
    """Keep something, and forget of its kind what nobody asked for lately.

    Args:
        path: as `kept_path` gives it.
        payload: the content.
        what: its kind in words, for the line that says that it could not be written.
    """
    content = hashlib.sha256(payload).digest() + payload
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        oldest = time.time() - UNUSED_DAYS * 24 * 3600
        for other in path.parent.glob(f"*{path.suffix}"):
            if other.stat().st_mtime < oldest:
                other.unlink(missing_ok=True)
    except OSError as error:
        cli.logger.info("%s are not kept: %s", what, error)
