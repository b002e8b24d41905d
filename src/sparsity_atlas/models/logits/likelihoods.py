"""What logits say of some tokens: their log-probabilities, and whether they are the likeliest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.models.memory import CHUNK
from sparsity_atlas.sparsify.transfer import sent


def likelihoods(
    pieces: Iterable[Tensor], rows: np.ndarray, targets: np.ndarray
) -> tuple[Tensor, Tensor]:
    """What pieces of logits say of some tokens.

    Args:
        pieces: logits [rows, vocabulary] each.
        rows: int64 [predictions], ascending: the row of all pieces that predicts a token.
        targets: int64 [predictions], that token.

    Returns:
        Log-probabilities [predictions], float32, and whether each token is the likeliest.
    """
    values, hits = [], []
    done = 0

    def read(piece: Tensor) -> None:
        nonlocal done
        totals = kernels.totals(piece.device.type)
        step = max(CHUNK.get(piece.device.type, CHUNK["cuda"]) // piece.shape[-1], 1)
        if totals is not None:  # which makes no copy
            step = len(piece)
        for part in piece.split(step):
            own = slice(*np.searchsorted(rows, (done, done + len(part))))
            row, target = (sent(one, piece.device) for one in (rows[own] - done, targets[own]))
            if totals is not None:
                total, likeliest = totals(part)
                values.append(part[row, target].float() - total[row])
                hits.append(likeliest[row] == target)
            else:
                likely = F.log_softmax(part, dim=-1, dtype=torch.float32)
                values.append(likely[row, target])
                hits.append(likely.argmax(-1)[row] == target)
                del likely  # before the next copy is made
            done += len(part)

    # By map and not in a loop, whose variable would hold a piece while the next one is made.
    for _ in map(read, pieces):
        pass
    return torch.cat(values), torch.cat(hits)
