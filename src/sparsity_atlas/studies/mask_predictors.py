"""How well a low-rank map of the FFN's input foretells a mask: what can be known before the FFN runs.

Two of them, both without gradients. `weights`: the site's tensor computed with W_g and W_u cut to their r
largest singular values, and the criterion on that. `probe`: a linear map of x onto the mask's bits by least
squares, of rank r, found on the first half of the captured sequences; its threshold lets through as many
entries as the mask has there. Both are tried on the second half. Recall is the share of what the mask keeps
that the predicted one keeps, too; it is read with the predicted sparsity, as in ProSparse (arXiv 2402.13516)
and ReLU² Wins (arXiv 2402.03804).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsity_atlas.activations.sources import given, reader
from sparsity_atlas.activations.store import ActivationStore, read_ahead
from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.place import matrix
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.sparsify.attach import dropping
from sparsity_atlas.studies.mask_table import PREDICTED, RECALL

WEIGHTS, PROBE = "weights", "probe"
PREDICTABLE = ("up", "gate", "intermediate")
# Of the mean of the inputs' squares: what is added to the diagonal of their Gram matrix.
RIDGE = 1e-3
# Of a tensor in a block of tokens.
BLOCK_BYTES = 64 * 2**20
# Entries among which a probe's threshold is found.
FEW_ENTRIES = 1 << 24


class LowRank:
    """A linear map with its weight cut to the largest singular values, its bias as it is."""

    def __init__(self, projection: Projection, width: int, like: Tensor) -> None:
        """Decompose a map.

        Args:
            projection: the map.
            width: entries that it reads.
            like: of the type and on the device of these.
        """
        weight = matrix(projection, width, like)
        zero = like.new_zeros(1, width)
        self._bias = projection(zero).float()
        left, values, self._right = torch.linalg.svd(weight, full_matrices=False)
        self._left = left * values

    def __call__(self, x: Tensor, rank: int) -> Tensor:
        """What the map of this rank makes of rows of float32."""
        found: Tensor = (x @ self._right[:rank].T) @ self._left[:, :rank].T + self._bias
        return found


class CutFFN:
    """An FFN's tensors from its input, with the maps to them cut to a rank."""

    def __init__(self, ffn: FFN) -> None:
        """Decompose the maps of an FFN."""
        self._ffn = ffn
        like = self._like = ffn.up.like(ffn.model)
        self._up = LowRank(ffn.up, ffn.hidden, like)
        self._gate = None if ffn.gate is None else LowRank(ffn.gate, ffn.hidden, like)

    def __call__(self, x: Tensor, tensor: str, rank: int) -> Tensor:
        """One of PREDICTABLE for rows of the input [rows, hidden], float32."""
        ffn = self._ffn
        if self._gate is None:
            return self._read(ffn.activation(self._up(x, rank)))
        if tensor == "up":
            return ffn.shaping(self._up(x, rank))
        gate = ffn.activation(self._gate(x, rank))
        if tensor == "gate":
            return gate
        return self._read(gate * ffn.shaping(self._up(x, rank)))

    def _read(self, product: Tensor) -> Tensor:
        """What the down projection reads."""
        norm = self._ffn.norm
        return product if norm is None else norm(product.to(self._like)).float()


class Probe:
    """A least-squares map of inputs onto masks, of every rank at once (reduced-rank regression).

    Of rank r it is the map of that rank that comes nearest to the mask's bits on what it was fitted to.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._products: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor, kept: Tensor) -> None:
        """Rows to fit: inputs [rows, hidden] and masks [rows, width]."""
        x = _with_one(x)
        gram, products = x.T @ x, x.T @ kept.double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._products = products if self._products is None else self._products + products
        self._rows += len(x)

    def fit(self) -> Callable[[Tensor, int], Tensor]:
        """The fitted map: scores [rows, width] of inputs [rows, hidden] at a rank."""
        assert self._gram is not None
        assert self._products is not None
        hidden = len(self._gram) - 1
        ridge = RIDGE * self._gram.diagonal()[:hidden].mean().clamp(min=1e-30)
        # The mean of the bits is no part of the rank, and costs nothing.
        mean_x = self._gram[hidden, :hidden] / self._rows
        mean_kept = self._products[hidden] / self._rows
        gram = self._gram[:hidden, :hidden] - self._rows * torch.outer(mean_x, mean_x)
        products = self._products[:hidden] - self._rows * torch.outer(mean_x, mean_kept)
        lower = torch.linalg.cholesky(gram + ridge * torch.eye(hidden).to(gram))
        whitened = torch.linalg.solve_triangular(lower, products, upper=False)
        # The left singular vectors, by the smaller of the two sides.
        _, vectors = torch.linalg.eigh(whitened @ whitened.T)
        vectors = vectors.flip(-1)
        down = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        up = vectors.T @ whitened

        def scores(x: Tensor, rank: int) -> Tensor:
            found: Tensor = ((x.double() - mean_x) @ down[:, :rank]) @ up[:rank] + mean_kept
            return found

        return scores


def _with_one(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.cat([wide, torch.ones_like(wide[:, :1])], 1)


class Tally:
    """What a predicted mask keeps of a true one."""

    def __init__(self) -> None:
        self.both = self.true = self.predicted = self.entries = 0

    def add(self, predicted: Tensor, kept: Tensor) -> None:
        """Count two masks of the same shape."""
        self.both += int((predicted & kept).sum())
        self.true += int(kept.sum())
        self.predicted += int(predicted.sum())
        self.entries += kept.numel()

    def rows(self, name: str, rank: int) -> Iterator[dict[str, Any]]:
        """Rows of `mask_table.SCHEMA`; by chance the recall is the share of all that is kept."""
        share = self.predicted / self.entries
        recall = self.both / self.true if self.true else None
        yield {"quantity": RECALL[name], "at": rank, "value": recall, "independent": share}
        yield {"quantity": PREDICTED[name], "at": rank, "value": 1 - share}


Blocks = Callable[[str], Iterator[tuple[Tensor, Tensor]]]
"""Of a level: inputs [rows, hidden] and its masks [rows, width], a block of tokens at a time."""
Mask = Callable[[str, Tensor], Tensor]
"""The mask at a level of a tensor's rows."""


def predict(
    ffn: FFN,
    tensor: str,
    ranks: Sequence[int],
    levels: Sequence[str],
    fitted: Blocks,
    tried: Blocks,
    mask: Mask,
) -> Iterator[dict[str, Any]]:
    """Rows of `mask_table.SCHEMA` of one tensor of one FFN, without what names its place.

    Beside a block of tokens 8 · hidden · (hidden + width) bytes are in memory, and a few times that while a
    probe is solved for.

    Args:
        ffn: the FFN.
        tensor: one of PREDICTABLE that it has.
        ranks: those up to its hidden size are tried.
        levels: of the criterion.
        fitted: what the probes may see.
        tried: what they have not seen.
        mask: of predicted vectors.
    """
    ranks = [rank for rank in ranks if rank <= ffn.hidden]
    cut = CutFFN(ffn)
    for level in levels:
        probe = Probe()
        for x, kept in fitted(level):
            probe.add(x, kept)
        scores = probe.fit()
        first = next(fitted(level))
        thresholds = {rank: _threshold(scores, rank, *first) for rank in ranks}
        tallies = {(name, rank): Tally() for name in (WEIGHTS, PROBE) for rank in ranks}
        for x, kept in tried(level):
            for rank in ranks:
                tallies[WEIGHTS, rank].add(mask(level, cut(x.float(), tensor, rank)), kept)
                tallies[PROBE, rank].add(scores(x, rank) >= thresholds[rank], kept)
        for (name, rank), tally in tallies.items():
            for row in tally.rows(name, rank):
                yield {"level": level, **row}


def _threshold(
    scores: Callable[[Tensor, int], Tensor], rank: int, x: Tensor, kept: Tensor
) -> Tensor:
    """The score that as many entries lie below as the mask drops, among the first rows."""
    rows = max(1, FEW_ENTRIES // kept.shape[1])
    found = scores(x[:rows], rank).flatten()
    dropped = int((~kept[:rows]).sum())
    # One number of the order: sorting 4 million for it takes six times as long, 0.97 s and 0.17 s of a core.
    nothing = found.new_tensor(torch.inf)
    return found.kthvalue(dropped + 1).values if dropped < len(found) else nothing


def predictor_rows(
    ffn: FFN,
    store: ActivationStore,
    tensor: str,
    rule: Criterion,
    ranks: Sequence[int],
    levels: Sequence[str],
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """`predict` for a captured FFN, from the token `first` on; probes see the first half of its sequences.

    Raises:
        AtlasError: there are fewer than two sequences.
    """
    ids = store.ids()
    length, sequences = ids.shape[1], (ids.size - first) // ids.shape[1]
    if sequences < 2:
        raise AtlasError(
            f"studies.predictors: takes two captured sequences or more (capture.tokens), found {sequences}"
        )
    middle, end = first + sequences // 2 * length, first + sequences * length
    step = max(1, BLOCK_BYTES // (4 * ffn.width * length)) * length

    def mask(level: str, vectors: Tensor) -> Tensor:
        seen = vectors.view(-1, length, vectors.shape[-1])
        found = dropping(rule, float(level))(seen, seen, None)
        kept = found.out != 0 if found.mask is None else found.mask & (seen != 0)
        return kept.flatten(0, 1)

    def blocks(start: int, stop: int) -> Blocks:
        places = [slice(one, min(one + step, stop)) for one in range(start, stop, step)]

        def of(level: str) -> Iterator[tuple[Tensor, Tensor]]:
            for _, block in read_ahead(reader(store, ffn, tensor), places):
                own = given(block, ffn)
                yield own["input"], mask(level, ffn.recompute(own, tensor))

        return of

    yield from predict(ffn, tensor, ranks, levels, blocks(first, middle), blocks(middle, end), mask)
