"""What a job of a model needs in memory, from the model's sizes and the largest batch that it runs.

Counted are the tensors that a pass must have at once; `benchmarks/memory.py` holds the sums against
measured peaks. Nothing heavy is imported: Snakemake asks for every job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsity_atlas.models.counted import Counted

MIB = 2**20
# Bytes of two parts of a capture up to which one is captured while the other is written.
MOST_HELD = 2 * 2**30
# Tensors that may wait for the disk where only one part is under way.
PENDING = 8
# Of a chunk of a captured array, about: between 8 and 16 MiB reads and writes run at the disk's speed.
CHUNK_BYTES = 12 * 2**20
# Logits of a piece: 128 MiB in float32. More on a GPU, which would wait for the host's work between two: 512
# MiB in 16 bits.
PIECE = {"cpu": 2**25, "cuda": 2**28, "mps": 2**25}
# Numbers that are turned into log-probabilities at a time: what a CPU's caches hold, and what keeps a
# GPU busy.
CHUNK = {"cpu": 2**21, "cuda": 2**26, "mps": 2**26}
# Tensors of a token's hidden width that a layer has at once (the residual, what is normalised of it, and
# attention's), and of the FFN's width (both factors, their product, and what is made of one of them). As
# measured, fewer on a GPU, where the next tensor takes the place of one that is gone.
HIDDEN_COPIES = {"cpu": 6, "cuda": 4, "mps": 6}
WIDTH_COPIES = {"cpu": 5, "cuda": 3, "mps": 5}
# Of the hidden width, for each expert that a token meets: what it gets, and what it makes of that, as it
# comes, weighted, and in the tokens' order.
ROUTED_COPIES = 4
# Of the hidden width, for each of a token's parallel residual streams: held while a layer's FFN runs, and
# when the streams are mixed; and what is there beside the mixed ones. Counted in AltUp (Gemma 3n), whose
# class keeps those that it began with, too; hyper-connections (DeepSeek V4) take up to a fifth less.
STREAMS_HELD, STREAMS_MIXED, BESIDE_STREAMS = 3, 5, 10
# Of the inputs that each layer has of a token by itself, at once where they are made for all layers.
INPUTS_MADE = 4
# Linear attention by the delta rule works on whole chunks of so many tokens, in float32. As counted in
# transformers' own code (Qwen3-Next, Kimi Linear): copies of keys and values (once for each head of
# values), of the decays between a chunk's tokens, and of a row's state.
CHUNK_TOKENS, CHUNK_ITEM = 64, 4
DELTA_COPIES, DECAY_COPIES, STATE_COPIES = 5, 3, 5
# Beside them the residual, what is normalised of it, and its output.
LINEAR_HIDDEN = 3
# What a CPU's heap takes of all that: 1.1 times as much at tensors of 32 and 48 MiB, 1.4 to 1.8 times at 16,
# whose blocks it does not give back. (The copies above are as measured, with it.)
HEAP = {"cpu": 1.375, "cuda": 1.0, "mps": 1.375}
# What the heap keeps of blocks that are smaller than `allocator.LARGE_BLOCK`, where all else was counted: of
# a small batch this share of it.
SMALL_BLOCKS, SMALL_SHARE = {"cpu": 32 * MIB, "cuda": 0, "mps": 0}, 0.75
# An output error, of a block of tokens: copies of all that a part reads and makes of them (blocks that are
# read ahead, outputs, masks and what is counted of them), and what does not grow. Measured on a CPU at 4,096
# to 16,384 tokens (benchmarks/README.md, section j).
ERROR_BLOCK, ERROR_COPIES, ERROR_BASE = 64 * MIB, 7, 64 * MIB
# Bytes of a token and counted vector: while the model runs, and when they are added up along requests.
COUNTED, ADDED_UP = 9, 48


@dataclass(frozen=True)
class Sizes:
    """Of a model.

    Attributes:
        parameters: all that are in memory.
        hidden: width of the residual stream.
        width: of the widest FFN.
        layers: how many.
        vocabulary: logits of a token.
        pieces: whether its logits can be made in pieces; see `head`.
        heads: of attention that keeps its scores (`eager`); 0: it keeps none.
        cache: numbers of a token's keys and values in all layers that keep them.
        capped: whether logits are changed behind the head, so that they are there twice.
        routed: experts that a token meets, each of which has its hidden states by itself; 0 without any.
        active: parameters that a token meets, of a mixture; 0: all.
        streams: parallel residual streams of a token; 0: it has one residual.
        layer_inputs: numbers of a token that the layers have as inputs of their own, of all of them.
        linear: numbers of a token's keys and values in a layer of linear attention, as many heads of either
            as there are of values; 0: no such layer.
        linear_pairs: decays between two tokens there: one for each head, or for each channel of its keys.
        linear_inputs: numbers that such a layer makes of a token before.
        state: of a row's state there.
        linear_layers: how many of them there are.
        counted: what its passes were seen to hold; None: it follows from the sizes above.
    """

    parameters: int
    hidden: int
    width: int
    layers: int
    vocabulary: int
    pieces: bool
    heads: int
    cache: int
    capped: bool = False
    routed: int = 0
    active: int = 0
    streams: int = 0
    layer_inputs: int = 0
    linear: int = 0
    linear_pairs: int = 0
    linear_inputs: int = 0
    state: int = 0
    linear_layers: int = 0
    counted: Counted | None = None

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Sizes:
        """As a model's manifest states them."""
        counted = manifest.get("counted")
        return cls(
            counted=None if counted is None else Counted(**counted),
            parameters=manifest["parameters"]["loaded"],
            active=manifest["parameters"].get("active", 0),
            hidden=manifest["hidden"],
            width=manifest["width"],
            layers=manifest["layers"],
            **manifest["memory"],
        )


@dataclass(frozen=True)
class Largest:
    """The largest batches of some work, in each respect by itself.

    Attributes:
        tokens: of a batch, padding included.
        longest: of a row.
        scored: tokens whose successor is predicted.
        pairs: of tokens in a batch whose rows branch, which takes a mask: rows × longest².
        kept: tokens whose keys and values generation keeps.
    """

    tokens: int = 0
    longest: int = 0
    scored: int = 0
    pairs: int = 0
    kept: int = 0

    @property
    def rows(self) -> int:
        """Of the batch, about: as if they were as long as the longest."""
        return -(-self.tokens // max(self.longest, 1))

    def __or__(self, other: Largest) -> Largest:
        return Largest(*(max(pair) for pair in zip(self, other, strict=True)))

    def __iter__(self) -> Any:
        return iter((self.tokens, self.longest, self.scored, self.pairs, self.kept))

    def shrunk(self, share: float) -> Largest:
        """With rows in this share only."""
        numbers = {
            name: int(getattr(self, name) * share) for name in ("tokens", "scored", "pairs", "kept")
        }
        return replace(self, **numbers)


def of_a_pass(sizes: Sizes, batch: Largest, item: int, device: str, slots: int) -> int:
    """Bytes beside the weights that a batch takes at most.

    Args:
        sizes: of the model.
        batch: the batch.
        item: bytes of a number in the type of the computation.
        device: its type.
        slots: counted vectors of a token, in all layers.
    """
    # Of a mask: who sees whom, what follows of it, and its numbers. Of scores: as they are, their softmax
    # in float32, and that in the type of the computation.
    masks = batch.pairs * (2 + item)
    layer = _in_the_layers(sizes, batch, item, device)
    running = layer + batch.tokens * slots * COUNTED + masks + _kept(sizes, batch, item)
    head = _at_the_head(sizes, batch, item, device)
    added_up = batch.tokens * slots * ADDED_UP
    if device == "cuda":  # one after the other, and each tensor is gone when nothing needs it
        return max(running, added_up, batch.tokens * slots * COUNTED + head)
    return max(running, added_up + head)


def _in_the_layers(sizes: Sizes, batch: Largest, item: int, device: str) -> int:
    """Bytes of what a layer has of a batch at once, as it was counted or as it follows from the sizes."""
    if sizes.counted is not None:
        counted = sizes.counted.of_a_pass(batch.tokens, batch.longest, item)
        return int(counted + min(SMALL_BLOCKS[device], SMALL_SHARE * counted))
    scores = batch.tokens * batch.longest * sizes.heads * (2 * item + 4)
    usual = _in_a_layer(sizes, batch, item, device)
    return scores + max(usual, _in_linear_attention(sizes, batch, item, device))


def _kept(sizes: Sizes, batch: Largest, item: int) -> int:
    """Bytes of keys, values and states that generation keeps."""
    if not batch.kept:
        return 0
    states = batch.rows * sizes.linear_layers * sizes.state * CHUNK_ITEM
    named = batch.kept * sizes.cache * item + states
    # Some models keep it in themselves, or only in what they are handed, and show nothing.
    seen = sizes.counted and sizes.counted.of_what_is_kept(batch.kept, batch.rows, item)
    return max(named, int(seen or 0))


def _in_a_layer(sizes: Sizes, batch: Largest, item: int, device: str) -> int:
    """Bytes of what a layer has of a batch's tokens at once, in its FFN or where streams are mixed."""
    hidden = HIDDEN_COPIES[device] + ROUTED_COPIES * sizes.routed
    usual = hidden * sizes.hidden + WIDTH_COPIES[device] * sizes.width
    held = STREAMS_HELD * sizes.streams * sizes.hidden
    # Nothing of the FFN is there any more, or nothing yet of any layer.
    mixed = (BESIDE_STREAMS + STREAMS_MIXED * sizes.streams) * sizes.hidden if sizes.streams else 0
    made = (INPUTS_MADE - 1) * sizes.layer_inputs
    in_ffn, besides = usual + HEAP[device] * held, HEAP[device] * max(mixed, made)
    most = max(in_ffn, besides) + HEAP[device] * sizes.layer_inputs
    return int(batch.tokens * most * item)


def _in_linear_attention(sizes: Sizes, batch: Largest, item: int, device: str) -> int:
    """Bytes of what a layer of linear attention has of a batch at once; each row is filled up to a chunk."""
    chunks = batch.rows * -(-batch.longest // CHUNK_TOKENS)
    token = DELTA_COPIES * sizes.linear + DECAY_COPIES * CHUNK_TOKENS * sizes.linear_pairs
    states = batch.rows * STATE_COPIES * sizes.state
    inputs = sizes.linear_inputs + LINEAR_HIDDEN * sizes.hidden
    found = (chunks * CHUNK_TOKENS * token + states) * CHUNK_ITEM + batch.tokens * inputs * item
    return int(HEAP[device] * found)


def _at_the_head(sizes: Sizes, batch: Largest, item: int, device: str) -> int:
    """Bytes of hidden states, of what the head is shown of them, and of logits."""
    wide = sizes.vocabulary
    piece = min(batch.scored * wide, max(PIECE.get(device, PIECE["cpu"]), wide))
    logits = piece if sizes.pieces else piece + batch.tokens * wide
    chunk = min(piece, max(CHUNK.get(device, CHUNK["cpu"]), wide))
    copies = batch.tokens if device == "cuda" else 2 * batch.tokens
    hidden = (copies + batch.scored) * sizes.hidden
    # Then, in float32, what is read of them; a kernel on a GPU reads them as they are.
    read = 0 if device == "cuda" else 4 * chunk
    return (hidden + logits) * item + max(read, piece * item if sizes.capped else 0)


def of_an_output_error(sizes: Sizes, tokens: int, length: int, item: int) -> int:
    """Bytes that an output error takes beside the weights.

    Args:
        sizes: of the model.
        tokens: that are looked at in all.
        length: of a sequence; a block is whole ones.
        item: bytes of a number in the type of the computation.
    """
    block = max(ERROR_BLOCK // (4 * sizes.width * length), 1) * length
    made = sizes.hidden + sizes.width * max(sizes.routed, 1)
    return ERROR_BASE + min(block, tokens) * ERROR_COPIES * made * item


def of_a_capture(arrays: list[int], batch: int, tokens: int, *, pinned: bool = False) -> int:
    """Bytes of captured tensors that wait in host memory to be written.

    Args:
        arrays: bytes of a token in each array that is captured, of all layers.
        batch: tokens of a forward pass.
        tokens: captured in all.
        pinned: whether a GPU writes them into pinned memory, whose blocks are powers of two.
    """
    part, waiting = waits(arrays, batch, tokens)
    sizes = [part * one for one in arrays]
    if pinned:
        sizes = [1 << (one - 1).bit_length() for one in sizes]
    widest, each = max(sizes), sum(sizes)
    if waiting is None:
        # Both parts, and copies of those tensors that are being written.
        held = 2 * each if 2 * part <= tokens else each * tokens // part
        return held + min(PENDING, len(arrays)) * widest
    # Those that wait come from all layers, wide and narrow.
    return waiting * each // len(arrays) + 4 * widest


def waits(arrays: list[int], batch: int, tokens: int) -> tuple[int, int | None]:
    """How a capture goes, of `of_a_capture`'s arguments: tokens of a part, and tensors that may wait.

    Where a part is several batches, all of it comes with its last batch, and waits while the next part
    is captured (None), up to `MOST_HELD`. Tensors of one batch come one by one, and a few may wait.
    """
    fitting = CHUNK_BYTES // max(arrays)
    # Whole batches, unless one is more than a chunk.
    part = min(max(batch, fitting - fitting % batch), tokens)
    together = part > batch and 2 * part * sum(arrays) <= MOST_HELD
    return part, None if together else PENDING
