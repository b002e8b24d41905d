"""Batches as bytes come back as they were."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_atlas.lm.forest import Batch, Request, pack
from sparsity_atlas.lm.kept.batch_file import read, written

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(1, 4)), max_size=20
)


@settings(deadline=None, max_examples=40)
@given(sequences=SEQUENCES, others=SEQUENCES)
def test_what_is_read_is_what_was_written(sequences: list, others: list) -> None:
    batches = {
        kind: pack(
            [
                Request(tokens, min(scored, len(tokens) - 1), i % 4, i % 3 > 0)
                for i, (tokens, scored) in enumerate(some)
            ],
            3,
            share=True,
        )
        for kind, some in (("second", sequences), ("first", others))
    }
    found, about = read(written(batches, {"cut": [0, 3], "task": ["ä"]}))
    assert about == {"cut": [0, 3], "task": ["ä"]}
    assert list(found) == list(batches)
    for kind, some in batches.items():
        for one, other in zip(found[kind], some, strict=True):
            for field in fields(Batch):
                ours, theirs = getattr(one, field.name), getattr(other, field.name)
                assert type(ours) is type(theirs), field.name
                if isinstance(theirs, np.ndarray):
                    assert ours.dtype == theirs.dtype, field.name
                    assert ours.shape == theirs.shape, field.name
                    assert ours.tolist() == theirs.tolist(), field.name
                else:
                    assert ours == theirs, field.name
