"""Paragraphs to token arrays, and token arrays to the sequences that a model is trained on."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo.corpus import PARAGRAPH_BREAK
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT_ID

IGNORED = -100  # the target that torch's cross entropy leaves out

_ENCODE_AT_ONCE = 20_000


@dataclass(frozen=True)
class Tokens:
    """A text as token ids (`ids`, uint16, (N,)) and where its paragraphs start in it (`starts`).

    Each paragraph ends with the tokens of the paragraph break.
    """

    ids: np.ndarray
    starts: np.ndarray


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Encode paragraphs one by one, in order."""
    pieces: list[np.ndarray] = []
    for first in range(0, len(texts), _ENCODE_AT_ONCE):
        part = [text + PARAGRAPH_BREAK for text in texts[first : first + _ENCODE_AT_ONCE]]
        encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        pieces.extend(np.array(encoding.ids, dtype=np.uint16) for encoding in encodings)
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return Tokens(np.concatenate(pieces), np.cumsum(lengths) - lengths)


def encode_cached(tokenizer: Tokenizer, texts: Sequence[str], folder: Path | None) -> Tokens:
    """`encode`, kept in `folder` under a digest of the text and the tokenizer."""
    if folder is None:
        return encode(tokenizer, texts)
    digest = hashlib.sha256(tokenizer.to_str().encode())
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\n")
    path = folder / f"{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return Tokens(stored["ids"], stored["starts"])
    tokens = encode(tokenizer, texts)
    folder.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".part.npz")
    np.savez(half_written, ids=tokens.ids, starts=tokens.starts)
    half_written.replace(path)
    return tokens


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, (V,); the special token stands for none."""
    # In a byte-level vocabulary one character spells one byte.
    lengths = [len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())]
    lengths[END_OF_TEXT_ID] = 0
    return np.array(lengths, dtype=np.int64)


def window_starts(tokens: Tokens, context: int, generator: np.random.Generator) -> np.ndarray:
    """One pass over the text in windows of `context` tokens that all begin a paragraph.

    The next window begins at the last paragraph start within a random distance of three quarters
    to the whole of a window, so each pass cuts the text differently. Of a paragraph longer than a
    window only the beginning is used.
    """
    starts = tokens.starts.tolist()
    last = len(tokens.ids) - context
    chosen: list[int] = []
    if last < 0:
        return np.array(chosen, dtype=np.int64)
    index = int(generator.integers(bisect_right(starts, min(context, last))))
    while index < len(starts) and starts[index] <= last:
        chosen.append(starts[index])
        reach = int(generator.integers(context * 3 // 4, context, endpoint=True))
        index = max(index + 1, bisect_right(starts, starts[index] + reach) - 1)
    return np.array(chosen, dtype=np.int64)


def training_windows(
    tokens: Tokens, context: int, sequences: int, seed: int
) -> Iterator[np.ndarray]:
    """Where the windows of each batch begin, int64 (sequences,), without end; shuffled in every pass.

    AtlasError if the text has no whole window.
    """
    generator = np.random.default_rng(seed)
    waiting = np.empty(0, dtype=np.int64)
    while True:
        fresh = window_starts(tokens, context, generator)
        if not len(fresh):
            raise AtlasError(
                f"--corpus: too small, {len(tokens.ids)} tokens, "
                f"expected many times the context length {context}"
            )
        waiting = np.concatenate([waiting, generator.permutation(fresh)])
        while len(waiting) >= sequences:
            now, waiting = waiting[:sequences], waiting[sequences:]
            yield now


def training_batches(
    tokens: Tokens, context: int, sequences: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, both int64 (sequences, context), without end; of `training_windows`.

    An input is the beginning-of-text token and the window without its last token; the target is
    the window.
    """
    offsets = np.arange(context)
    for starts in training_windows(tokens, context, sequences, seed):
        targets = tokens.ids[starts[:, None] + offsets].astype(np.int64)
        yield _shifted(targets), targets


def evaluation_blocks(
    ids: np.ndarray, context: int, stride: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The text cut into consecutive blocks, so that every token is predicted exactly once.

    Inputs and targets, int64 (blocks, context); each block is predicted from the
    beginning-of-text token and itself. The last block is filled up with `IGNORED` targets.
    With a `stride` only every stride-th block is kept.
    """
    positions = np.arange(0, len(ids), context * stride)[:, None] + np.arange(context)
    inside = positions < len(ids)
    found = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
    return _shifted(found), np.where(inside, found, IGNORED)


def _shifted(windows: np.ndarray) -> np.ndarray:
    inputs = np.empty_like(windows)
    inputs[:, 0] = END_OF_TEXT_ID
    inputs[:, 1:] = windows[:, :-1]
    return inputs
