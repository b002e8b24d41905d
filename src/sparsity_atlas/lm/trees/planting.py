"""How requests become trees: what is common to them is found and laid out as arrays, for all at once.

Requests stand in the order of their tokens, so that each shares most with the one before it. A tree's
nodes are its tokens depth-first; a request is a path from the root.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from sparsity_atlas.lm.trees.sequences import Sequences, counting, pieces

# Requests share a row if this part of the later one is common to both: a token that they share is
# saved, but all others of the row become longer to attend over.
WORTH_SHARING = 0.25
# Tokens of a row that branches: at most so many, or this multiple of its first request.
SMALL_TREE, GROWTH = 64, 2


@dataclass(frozen=True)
class Forest:
    """Trees of requests, whose nodes and requests stand tree by tree.

    Attributes:
        sizes: nodes of each tree, int64 [trees].
        node_ends: number behind each tree's last node, int64 [trees].
        leaf_ends: likewise of its requests.
        tokens: int64 [nodes].
        depth: of each node, the root's 0, int64 [nodes].
        ends: number in its tree behind each node's last descendant, int64 [nodes].
        requests: numbers, int64 [requests]; the following in their order.
        run: tokens of each that are run.
        last: node in its tree of its last token that is run.
        known: node of its last token that the document's request before brought as well; -1 for none.
        brought: how many tokens that makes.
        scored: how many tokens are predicted.
        firsts: where they begin in the following.
        predictions: nodes whose next token is predicted, request by request.
        targets: these tokens.
    """

    sizes: np.ndarray
    node_ends: np.ndarray
    leaf_ends: np.ndarray
    tokens: np.ndarray
    depth: np.ndarray
    ends: np.ndarray
    requests: np.ndarray
    run: np.ndarray
    last: np.ndarray
    known: np.ndarray
    brought: np.ndarray
    scored: np.ndarray
    firsts: np.ndarray
    predictions: np.ndarray
    targets: np.ndarray

    def nodes(self, tree: int) -> slice:
        """A tree's nodes."""
        end = int(self.node_ends[tree])
        return slice(end - int(self.sizes[tree]), end)

    def leaves(self, tree: int) -> slice:
        """A tree's requests."""
        return slice(int(self.leaf_ends[tree - 1]) if tree else 0, int(self.leaf_ends[tree]))

    def sort_key(self, tree: int) -> tuple[int, bytes, int]:
        """Longest first, then by tokens."""
        text = self.tokens[self.nodes(tree)].astype(">u4").tobytes()
        return -int(self.sizes[tree]), text, int(self.requests[self.leaves(tree).start])


def grow(sequences: Sequences, budget: int, *, share: bool) -> Forest:
    """Plant requests in the order of their tokens.

    Args:
        sequences: of the requests.
        budget: tokens of the largest tree.
        share: whether trees may branch; if not, only requests that run the same tokens share one.
    """
    order = sequences.in_order()
    lengths = sequences.lengths[order].tolist()
    common = sequences.common(order).tolist()
    shared: list[int] = []
    begins: list[bool] = []
    size = limit = before = 0
    for length, alike in zip(lengths, common, strict=True):
        same = alike == length == before
        worthwhile = share and alike >= WORTH_SHARING * length and size + length - alike <= limit
        # The first request begins a tree, as nothing is before it.
        begin = not begins or not (same or worthwhile)
        if begin:
            limit = min(max(GROWTH * length, SMALL_TREE), budget)
            size = alike = 0
        begins.append(begin)
        shared.append(alike)
        size += length - alike
        before = length
    return _laid_out(sequences, order, sequences.brought(order), shared, begins)


def rows(sequences: Sequences, some: list[list[int]]) -> Forest:
    """A tree for each row that is given: numbers of requests that run the same tokens."""
    order = np.array([number for row in some for number in row])
    begins = [not place for row in some for place in range(len(row))]
    lengths = sequences.lengths[order].tolist()
    shared = [0 if begin else length for begin, length in zip(begins, lengths, strict=True)]
    return _laid_out(sequences, order, sequences.brought(sequences.in_order()), shared, begins)


class _Path:
    """The nodes of the latest request of a tree: runs of nodes that follow each other.

    Attributes:
        size: nodes of the tree so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._depths: list[int] = []  # where each run begins
        self._nodes: list[int] = []  # its first node
        self._length = 0

    def turn(self, shared: int, length: int) -> list[tuple[int, int, int]]:
        """Go on to a request that shares so many tokens with the latest.

        Returns:
            (first, behind the last, end): nodes whose last descendant has come.
        """
        left = []
        above = self._length
        while self._depths and above > shared:
            depth = self._depths[-1]
            first = max(depth, shared)
            node = self._nodes[-1] + first - depth
            left.append((node, node + above - first, self.size))
            above = first
            if depth >= shared:
                self._depths.pop()
                self._nodes.pop()
        if length > shared:
            self._depths.append(shared)
            self._nodes.append(self.size)
            self.size += length - shared
        self._length = length
        return left

    def node(self, depth: int) -> int:
        """The node at a depth."""
        run = bisect_right(self._depths, depth) - 1
        return self._nodes[run] + depth - self._depths[run]

    def straight_from(self) -> int:
        """The depth from which on nodes follow each other to the end."""
        return self._depths[-1]


def _laid_out(
    sequences: Sequences,
    order: np.ndarray,
    brought: np.ndarray,
    shared: list[int],
    begins: list[bool],
) -> Forest:
    """Lay trees out.

    Args:
        sequences: of the requests.
        order: their numbers.
        brought: see `Forest`, by number.
        shared: tokens that each, in the order, shares with the one before it in its tree.
        begins: whether it begins a tree.
    """
    run, scored = sequences.lengths[order], sequences.scored[order]
    known_count = brought[order]
    own = run - np.array(shared)
    starts = np.flatnonzero(begins)
    sizes = np.add.reduceat(own, starts)
    node_ends = sizes.cumsum()
    tokens = pieces(sequences.flat, sequences.starts[order] + shared, own)
    depths = counting(np.array(shared), own)
    ends = np.repeat(sizes, sizes)
    last, known = [], []
    bent: list[
        tuple[int, int]
    ] = []  # of the predictions those at another node than the last one says
    path, offset, tree, first_scored = _Path(), 0, -1, 0
    settings = zip(begins, shared, run.tolist(), scored.tolist(), known_count.tolist(), strict=True)
    for begin, alike, length, predicted, before in settings:
        if begin:
            tree += 1
            path, offset = _Path(), int(node_ends[tree] - sizes[tree])
        for first, behind, end in path.turn(alike, length):
            ends[offset + first : offset + behind] = end
        last.append(path.node(length - 1))
        known.append(path.node(before - 1) if before else -1)
        begun = length - predicted
        for depth in range(begun, path.straight_from()):
            bent.append((first_scored + depth - begun, path.node(depth)))
        first_scored += predicted
    firsts = scored.cumsum() - scored
    last_nodes = np.array(last)
    predictions = counting(last_nodes + 1 - scored, scored)
    if bent:
        places, nodes = np.array(bent).T
        predictions[places] = nodes
    # The token behind each node that predicts.
    targets = pieces(sequences.flat, sequences.starts[order] + run + 1 - scored, scored)
    return Forest(
        sizes,
        node_ends,
        np.append(starts[1:], len(order)),
        tokens,
        depths,
        ends,
        order,
        run,
        last_nodes,
        np.array(known),
        known_count,
        scored,
        firsts,
        predictions,
        targets,
    )
