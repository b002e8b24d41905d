"""Text for capture: what becomes of its documents, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsity_atlas.activations.text_files import kind_of
from sparsity_atlas.activations.texts import digest_of, documents, token_ids
from sparsity_atlas.errors import AtlasError
from tiny_lm import tiny_tokenizer

TOKENIZER = tiny_tokenizer(bos=True)
EOS, BOS = 2, 1


def jsonl(path: Path, *lines: object) -> dict[str, str]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"file": str(path)}


def test_documents_in_order_between_end_tokens(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "the cat"}, {"text": "a bird – ä"}, {"text": "x"})
    assert list(documents(source)) == ["the cat", "a bird – ä", "x"]
    stream = [
        token
        for text in documents(source)
        for token in [*TOKENIZER.encode(text, add_special_tokens=False), EOS]
    ]
    ids = token_ids(source, TOKENIZER, 5, 3, bos=False)
    assert ids.shape == (2, 3)  # rounded up to whole sequences
    assert ids.dtype == np.int64
    assert ids.flatten().tolist() == stream[:6]
    with_bos = token_ids(source, TOKENIZER, 5, 3, bos=True)
    assert with_bos[:, 0].tolist() == [BOS, BOS]
    assert with_bos[:, 1:].flatten().tolist() == stream[:4]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\nthe bird\n")
    source = {"file": str(tmp_path / "a.txt")}
    assert list(documents(source)) == ["the cat\n\nthe bird\n"]
    assert EOS not in token_ids(source, TOKENIZER, 4, 2, bos=False)


def test_another_column(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"page": "the cat"})
    assert list(documents({**source, "column": "page"})) == ["the cat"]


def test_the_digest_is_that_of_the_tokens(tmp_path: Path) -> None:
    texts = ["a cat sees the old bird", "the cat sees the old bird"]
    sources = [jsonl(tmp_path / f"{i}.jsonl", {"text": text}) for i, text in enumerate(texts)]
    same = jsonl(tmp_path / "same.jsonl", {"text": texts[0], "more": 1})
    first, second, third = (
        digest_of(token_ids(source, TOKENIZER, 7, 7, bos=False)) for source in (*sources, same)
    )
    assert first == third != second
    assert digest_of(np.zeros((2, 3), np.int64)) != digest_of(np.zeros((3, 2), np.int64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"page": "b"}\n', r"a\.jsonl: line 2 is not JSON with a text in 'text'"),
        (b'{"text": "a"}\nhello\n', r"a\.jsonl: line 2 is not JSON with a text in 'text'"),
        (b'["a"]\n', r"a\.jsonl: line 1 is not JSON with a text in 'text'"),
        (b'{"text": "\xff\xfe"}\n', r"a\.jsonl: not UTF-8"),
        (b'{"text": "a"}\n', r"a\.jsonl has \d tokens, 1,000 are asked for \(capture\.tokens\)"),
        (b"", r"a\.jsonl has 0 tokens, 1,000 are asked for"),
    ],
)
def test_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(AtlasError, match=message):
        token_ids({"file": str(tmp_path / "a.jsonl")}, TOKENIZER, 1000, 10, bos=False)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_empty_table_has_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"", mtime=0) if name.endswith("gz") else b"")
    assert list(documents({"file": str(tmp_path / name)})) == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"texts: .*: a folder; name one file"):
        list(documents({"file": str(tmp_path)}))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"texts: .*none\.txt: no such file"):
        list(documents({"file": str(tmp_path / "none.txt")}))


def test_a_text_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AtlasError, match=r"a\.txt: not UTF-8"):
        list(documents({"file": str(tmp_path / "a.txt")}))


TEXTS = ["the cat", 'a bird – ä, "quoted"', "12", "NA", "two\nlines"]


def as_table(path: Path, column: str = "text") -> bytes:
    """`TEXTS` as the kind of file that a name says."""
    kind, compressed = kind_of(path)
    table = pa.table({"id": list(range(len(TEXTS))), column: TEXTS})
    rows = [{"id": i, column: text} for i, text in enumerate(TEXTS)]
    if kind in (".csv", ".tsv"):
        text = pd.DataFrame(rows).to_csv(index=False, sep="," if kind == ".csv" else "\t")
        content = text.encode()
    elif kind == ".json":
        content = json.dumps(rows, indent=1).encode()
    elif kind == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        content = path.read_bytes()
    elif kind == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        content = path.read_bytes()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    squeeze = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, None: bytes}
    return squeeze[compressed](content)


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"),
        *("a.jsonl.gz", "a.jsonl.bz2", "a.ndjson.xz", "a.Json.GZ", "a.csv.gz", "a [1] *.v2.json"),
    ],
)
def test_a_table_has_the_same_documents_whatever_its_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(as_table(path))
    assert list(documents({"file": str(path)})) == TEXTS
    assert list(documents({"file": str(path), "documents": [1, 3]})) == TEXTS[1:3]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_table_s_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(as_table(path, "page"))
    assert list(documents({"file": str(path), "column": "page"})) == TEXTS
    with pytest.raises(AtlasError, match=rf"{name}.*'text'"):
        list(documents({"file": str(path)}))


@pytest.mark.parametrize("squeeze", [None, gzip.compress, bz2.compress, lzma.compress])
def test_a_text_is_one_document_compressed_or_not(tmp_path: Path, squeeze: Any) -> None:
    suffix = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[squeeze]
    content = "\ufeffthe cat\n\nthe bird\n".encode()  # a byte-order mark is no text
    (tmp_path / f"a.TXT{suffix}").write_bytes(squeeze(content) if squeeze else content)
    assert list(documents({"file": str(tmp_path / f"a.TXT{suffix}")})) == ["the cat\n\nthe bird\n"]


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("a", "b")]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n \n\n", encoding="utf-8")
    assert list(documents({"file": str(tmp_path / "a.jsonl")})) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"text", r"a\.md: expected \.txt, \.jsonl, .*\.arrow, .*found \.md"),
        ("a", b"text", r"/a: expected .*found no suffix"),
        ("a.gz", gzip.compress(b"text", mtime=0), r"a\.gz: expected .*found \.gz"),
        ("a.docx.xz", b"text", r"found \.xz"),
        ("a.jsonl", b'{"text": "bad \\ud800 x"}\n', r"a\.jsonl: line 1: half of a surrogate pair"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: cannot be unpacked"),
        ("a.jsonl.xz", b'{"text": "a"}\n', r"a\.jsonl\.xz: cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], r"a\.txt\.gz: cannot be unpacked"),
        ("a.json", b"{no json", r"a\.json: cannot be read as json: "),
        ("a.json", b'{"text": 3}\n', r"a\.json: row 1 has no text in 'text'"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read as parquet: "),
        ("a.arrow", b"no arrow", r"a\.arrow: cannot be read as arrow: "),
        ("a.csv", b"", r"a\.csv: cannot be read as csv: "),
        ("a.csv", b"text;id\nthe cat;1\n", r"a\.csv has no column 'text'; it has text;id$"),
        # pandas would take what lies before a comma for the name of the row.
        ("a.csv", b"text\nthe cat, a bird\nx\n", r"a\.csv: row 1 has more cells than the header"),
        ("a.tsv", b"id\ttext\n1\ta\tb\n", r"a\.tsv: row 1 has more cells than the header"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"a\.csv: cannot be read as csv: .*line 3, saw 3"),
    ],
)
def test_a_file_that_is_not_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AtlasError, match=message) as caught:
        list(documents({"file": str(tmp_path / name)}))
    assert "\n" not in str(caught.value)
