"""Text for capture: what becomes of its documents, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.texts import digest_of, documents, token_ids
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


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"texts: .*none\.txt: no such file"):
        list(documents({"file": str(tmp_path / "none.txt")}))


def test_a_text_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AtlasError, match=r"a\.txt: not UTF-8"):
        list(documents({"file": str(tmp_path / "a.txt")}))
