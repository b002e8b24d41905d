"""An append-only record of finished batches, so that a killed job goes on where it stood.

One line a record: CRC-32 of the JSON as eight hex digits, a space, the JSON. The first record is the
fingerprint of the work. A line that is cut or damaged ends what is believed: it and all after it are
dropped, and the work goes on from there.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from sparsity_atlas.files.whole import canonical


class Journal:
    """The journal at `path`, continued if it holds the same fingerprint and started anew otherwise.

    Attributes:
        records: what earlier runs finished, in order.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self._file: BinaryIO
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.loads(canonical(fingerprint))
        lines = whole_lines(path)
        if lines and lines[0][0] == header:
            self.records = [record for record, _ in lines[1:]]
            self._file = path.open("r+b")
            self._file.truncate(lines[-1][1])
            self._file.seek(0, os.SEEK_END)
        else:
            self.records = []
            self._file = path.open("wb")
            self._write(header)

    def append(self, record: Any) -> None:
        """Add a record; it survives the death of this process from here on."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: Any) -> None:
        text = canonical(record).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()

    def close(self) -> None:
        """Close the file; the journal stays on disk."""
        self._file.close()

    def delete(self) -> None:
        """Remove the journal: its content stands elsewhere now."""
        self.close()
        self.path.unlink(missing_ok=True)


def whole_lines(path: Path) -> list[tuple[Any, int]]:
    """The undamaged records from the start of a journal, each with the offset where it ends."""
    if not path.exists():
        return []
    records = []
    end = 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                break
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                break
            end += len(line)
            records.append((record, end))
    return records
