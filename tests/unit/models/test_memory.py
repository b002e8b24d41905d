"""Bytes of a pass and of a capture, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsity_atlas.models import memory
from sparsity_atlas.models.memory import Largest, Sizes, of_a_capture, of_a_pass, of_an_output_error

PLAIN = Sizes(
    parameters=1, hidden=512, width=1024, layers=6, vocabulary=8, pieces=True, heads=0, cache=0
)
# 16 rows of 512 tokens, of which little is scored.
BATCH = Largest(8192, 512, 16)
USUAL = 6 * 512 + 5 * 1024


def test_a_plain_layer() -> None:
    assert of_a_pass(PLAIN, BATCH, 4, "cpu", 0) == 8192 * USUAL * 4
    assert of_a_pass(PLAIN, BATCH, 2, "cuda", 0) == 8192 * (4 * 512 + 3 * 1024) * 2


def test_parallel_streams_are_held_and_mixed() -> None:
    """Of four: twelve tensors beside a wide FFN, or thirty where the FFN is narrow."""
    wide = replace(PLAIN, streams=4, width=8192)
    held = 6 * 512 + 5 * 8192 + 1.375 * 3 * 4 * 512
    assert of_a_pass(wide, BATCH, 4, "cpu", 0) == 8192 * held * 4
    narrow = replace(PLAIN, streams=4)
    assert of_a_pass(narrow, BATCH, 4, "cpu", 0) == 8192 * 1.375 * 30 * 512 * 4
    # On a GPU nothing is held beyond its use.
    assert of_a_pass(narrow, BATCH, 2, "cuda", 0) == 8192 * 30 * 512 * 2


def test_inputs_of_layers_are_made_before_the_first_and_held_to_the_last() -> None:
    few = replace(PLAIN, layer_inputs=6 * 64)
    assert of_a_pass(few, BATCH, 4, "cpu", 0) == 8192 * (USUAL + 1.375 * 384) * 4
    many = replace(PLAIN, layer_inputs=30 * 256)
    assert of_a_pass(many, BATCH, 4, "cpu", 0) == 8192 * 1.375 * 4 * 7680 * 4


LINEAR = replace(
    PLAIN,
    linear=16 * 128,
    linear_pairs=16,
    linear_inputs=4 * 512 + 3 * 1024,
    state=16 * 64 * 64,
    linear_layers=3,
)


@pytest.mark.parametrize(("longest", "filled"), [(512, 512), (500, 512), (30, 64)])
def test_linear_attention_fills_each_row_up_to_a_chunk(longest: int, filled: int) -> None:
    batch = Largest(16 * longest, longest, 16)
    chunked = 16 * filled * (5 * 2048 + 3 * 64 * 16) + 16 * 5 * 65_536
    inputs = 16 * longest * (5120 + 3 * 512)
    assert of_a_pass(LINEAR, batch, 4, "cpu", 0) == int(1.375 * 4 * (chunked + inputs))
    # In float32 whatever the model is in.
    assert of_a_pass(LINEAR, batch, 2, "cuda", 0) == 4 * chunked + 2 * inputs


def test_generation_keeps_a_state_of_each_row_and_linear_layer() -> None:
    scored = Largest(8192, 512, 16)
    kept = replace(scored, kept=16 * 600)
    states = 16 * 3 * 65_536 * 4
    more = of_a_pass(LINEAR, kept, 4, "cpu", 0) - of_a_pass(LINEAR, scored, 4, "cpu", 0)
    assert more == states
    assert of_a_pass(PLAIN, kept, 4, "cpu", 0) == of_a_pass(PLAIN, scored, 4, "cpu", 0)


def test_a_capture_holds_two_parts_where_its_batches_fit_into_chunks() -> None:
    """2,048 tokens of 6 KiB are a chunk, of two batches; sums and parts as `capture` has them."""
    arrays = [6144, 2304] * 30
    part = 2048
    assert of_a_capture(arrays, 1024, 8192) == 2 * part * sum(arrays) + 8 * part * 6144
    # No more than there is to capture.
    assert of_a_capture(arrays, 1024, 3000) == 3000 * sum(arrays) + 8 * part * 6144
    assert of_a_capture(arrays[:4], 1024, 8192) == 2 * part * 16_896 + 4 * part * 6144
    assert part == memory.CHUNK_BYTES // 6144


def test_a_capture_whose_batch_is_more_than_a_chunk_holds_a_few_tensors() -> None:
    """GPT-2's shape: one part of a batch is under way, of whose 24 tensors eight wait and one is made."""
    arrays = [12_288, 3072] * 12
    assert of_a_capture(arrays, 2048, 8192) == 2048 * (8 * 7680 + 4 * 12_288)
    assert of_a_capture(arrays, 2048, 1000) == 1000 * (8 * 7680 + 4 * 12_288)


def test_a_capture_whose_parts_are_one_batch_holds_a_few_tensors() -> None:
    """They come one by one: eight of a batch wait, however many layers there are."""
    for layers in (30, 300):
        arrays = [6144, 2304] * layers
        assert of_a_capture(arrays, 2048, 8192) == 2048 * (8 * 4224 + 4 * 6144)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """2,048 tokens of 6 KiB take 16 MiB, of 2,304 bytes 8."""
    arrays = [6144, 2304] * 30
    assert of_a_capture(arrays, 2048, 8192, pinned=True) == (8 * 12 + 4 * 16) * 2**20
    assert of_a_capture(arrays, 1024, 8192, pinned=True) == (2 * 30 * 24 + 8 * 16) * 2**20


def test_an_output_error_takes_a_block_of_whole_sequences() -> None:
    """64 MiB of the widest tensor in float32 are 16,384 tokens of 1,024 numbers."""
    each = 7 * (512 + 1024) * 4
    assert of_an_output_error(PLAIN, 4096, 512, 4) == 64 * 2**20 + 4096 * each
    assert of_an_output_error(PLAIN, 10**6, 512, 4) == 64 * 2**20 + 16_384 * each
    assert of_an_output_error(PLAIN, 10**6, 500, 4) == 64 * 2**20 + 16_000 * each
    mixture = replace(PLAIN, routed=4)
    more = of_an_output_error(mixture, 4096, 512, 2) - of_an_output_error(PLAIN, 4096, 512, 2)
    assert more == 4096 * 7 * 3 * 1024 * 2
