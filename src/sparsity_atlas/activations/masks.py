"""What a masked-diffusion model is shown of a captured text: some tokens, as when others are asked for."""

from __future__ import annotations

import numpy as np

from sparsity_atlas.activations.texts import digest_of


def masked(ids: np.ndarray, mask_token: int, kept: int) -> np.ndarray:
    """A text with random tokens of each sequence masked: in one sequence few, in another all.

    How many are is spread evenly over the sequences, as over the rows that bound a likelihood (arXiv
    2502.09992). The masks follow from the text alone.

    Args:
        ids: int64 [sequences, positions].
        mask_token: id of the mask.
        kept: tokens at the beginning of a sequence that are shown.
    """
    generator = np.random.Generator(np.random.PCG64(int(digest_of(ids), 16)))
    sequences, positions = ids.shape
    able = positions - kept
    shares = (generator.permutation(sequences) + generator.random()) / sequences
    # Rounding could bring the last share up to one.
    sizes = np.minimum((shares * able).astype(np.int64) + 1, able)
    ranks = generator.random((sequences, able)).argsort(axis=1).argsort(axis=1)
    found = ids.copy()
    found[:, kept:][ranks < sizes[:, None]] = mask_token
    return found
