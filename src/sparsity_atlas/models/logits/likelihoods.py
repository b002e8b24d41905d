"""What logits say of some tokens: their log-probabilities, and whether they are the likeliest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.models.memory import CHUNK
from sparsity_atlas.sparsify.transfer import sent


@torch.no_grad()
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
    # One place for all copies: memory that is taken and given back for each of them is hardly ever taken
    # again by glibc, and a batch ended up with half a gigabyte of it.
    room: Tensor | None = None

    def read(piece: Tensor) -> None:
        nonlocal done, room
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
                if room is None or len(room) < len(part):
                    room = torch.empty(part.shape, dtype=torch.float32, device=part.device)
                likely = room[: len(part)]
                torch.log_softmax(part, dim=-1, dtype=torch.float32, out=likely)
                values.append(likely[row, target])
                hits.append(likely.argmax(-1)[row] == target)
            done += len(part)

    # By map and not in a loop, whose variable would hold a piece while the next one is made.
    for _ in map(read, pieces):
        pass
    return torch.cat(values), torch.cat(hits)
