"""A journal believes whole records of the same work, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.files.journal import Journal

WORK = {"weights": "abc", "level": "0.9"}
RECORDS = [{"zeros": [1, 2], "score": -1.25}, {"zeros": [3], "score": 0.1}, {"text": "ä\n ü"}]


def write(path: Path) -> bytes:
    journal = Journal(path, WORK)
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def reopen(path: Path, fingerprint: dict = WORK) -> list:
    journal = Journal(path, fingerprint)
    journal.close()
    return journal.records


def test_goes_on_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    whole = write(path)
    assert reopen(path) == RECORDS
    assert path.read_bytes() == whole
    journal = Journal(path, WORK)
    journal.append({"last": True})
    journal.close()
    assert reopen(path) == [*RECORDS, {"last": True}]


@pytest.mark.parametrize("key", [*WORK, "more"])
def test_another_fingerprint_starts_anew(tmp_path: Path, key: str) -> None:
    path = tmp_path / "journal"
    write(path)
    assert reopen(path, {**WORK, key: "other"}) == []
    assert reopen(path) == []


def test_the_order_of_a_fingerprint_s_keys_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path)
    assert reopen(path, dict(reversed(WORK.items()))) == RECORDS


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "journal"
    whole = write(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = max(sum(end <= cut for end in ends) - 1, 0)
    journal = Journal(path, WORK)
    assert journal.records == RECORDS[:complete]
    for record in RECORDS[complete:]:
        journal.append(record)
    journal.close()
    assert path.read_bytes() == whole


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_flipped_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "journal"
    whole = write(path)
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    line = whole[:place].count(b"\n")  # 0: the fingerprint
    assert reopen(path) == RECORDS[: max(line - 1, 0)]


def test_a_deleted_journal_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path)
    journal = Journal(path, WORK)
    journal.delete()
    assert not path.exists()
    assert reopen(path) == []


def test_nan_is_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", WORK)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"score": float("nan")})
    journal.close()
    assert reopen(tmp_path / "journal") == []
