"""Batches of requests in which tokens that several requests begin with are run once.

Requests that begin alike become a tree, and a tree becomes one row of a batch: its tokens depth-first,
each at the position that it has in its requests, seeing its own ancestors only. A row whose requests
do not branch is an ordinary sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Requests share a row if this part of the later one is common to both: a token that they share is
# saved, but all others of the row become longer to attend over.
WORTH_SHARING = 0.25
# Tokens of a row that branches: at most so many, or this multiple of its first request.
SMALL_TREE, GROWTH = 64, 2


@dataclass(frozen=True)
class Request:
    """A sequence to score.

    Attributes:
        tokens: ids; the last one is predicted, but not run.
        scored: how many tokens at the end are predicted.
        owner: the document that it belongs to, by number.
        counted: whether its tokens count as run; not where lm-eval reads it from another request's pass.
    """

    tokens: list[int]
    scored: int
    owner: int
    counted: bool = True

    @property
    def run(self) -> list[int]:
        """Tokens that go through the model."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Leaf:
    """Where a request ends in its tree.

    Attributes:
        request: its number.
        node: of its last token that is run.
        known: node of its last token that the document's request before brought as well; -1 for none.
        brought: how many tokens that makes.
        scored: nodes whose next token is predicted.
        targets: these tokens.
    """

    request: int
    node: int
    known: int
    brought: int
    scored: list[int]
    targets: list[int]


@dataclass
class Tree:
    """Requests with a common beginning; nodes are numbered depth-first.

    Attributes:
        tokens: of the nodes.
        depth: of the nodes, the root's 0.
        closed: for some nodes the number behind their last descendant's; it is behind the last node's for
            the others, those of the latest request among them.
        leaves: the requests.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    closed: dict[int, int] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        tokens: int64 [rows, longest], 0 where a row is shorter.
        lengths: int64 [rows].
        depth: int64 [rows, longest], position of each token in its requests.
        ends: int64 [rows, longest]: a token is seen by those behind it in its row, up to here.
        branched: whether any row is more than one sequence.
        requests: numbers of the requests in it.
        owners: of each of them, as an index into `documents`.
        documents: owners that occur, in ascending order.
        last: flat index [row * longest + column] of each request's last token.
        known: likewise, of its last token that its document has already brought; -1 for none.
        run: how many tokens each request runs.
        counted: int64 [requests], 1 where these tokens count as run, 0 where an equal request's do.
        brought: how many of them its document has already brought.
        scored: flat indices of the tokens whose successor is predicted, each once, ascending.
        row: for each prediction its index into `scored`.
        targets: for each prediction the token, request by request.
        firsts: index of each request's first prediction.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    depth: np.ndarray
    ends: np.ndarray
    branched: bool
    requests: list[int]
    owners: np.ndarray
    documents: list[int]
    last: np.ndarray
    known: np.ndarray
    run: np.ndarray
    counted: np.ndarray
    brought: np.ndarray
    scored: np.ndarray
    row: np.ndarray
    targets: np.ndarray
    firsts: np.ndarray


def times(batch: Batch) -> np.ndarray:
    """How often each token of a batch counts: int64 [2, rows, longest], 0 where padding is.

    First as often as it stands in a request that counts, then once for each document that it is new to:
    added up, what `Usage.tokens` says of `scoring` and `unique`.
    """
    rows, longest = batch.tokens.shape
    ends = np.zeros(
        (2, rows * longest + 1), np.int64
    )  # of requests, each behind its last token's place
    np.add.at(ends[0], batch.last + 1, batch.counted)
    np.add.at(ends[1], batch.last + 1, 1)
    np.subtract.at(ends[1], batch.known[batch.known >= 0] + 1, 1)
    before = ends.cumsum(1)
    # A token stands in the requests that end at it or at one of its descendants, which follow it.
    first = np.arange(rows * longest)
    last = (batch.ends + longest * np.arange(rows)[:, None]).ravel()
    found: np.ndarray = before[:, last] - before[:, first]
    return found.reshape(2, rows, longest)


def pack(
    requests: list[Request], batch_size: int, *, share: bool, shortest: int = 0
) -> list[Batch]:
    """Arrange requests in batches, longest row first, as the requests and the arguments alone say.

    A batch holds as many tokens, padding included, as `batch_size` of the longest request.

    Args:
        requests: in any order.
        batch_size: sequences of the longest batch.
        share: whether rows may branch; if not, only requests that run the same tokens share a row.
        shortest: tokens for which the longest request is taken, if it is shorter.
    """
    if not requests:
        return []
    budget = batch_size * max(shortest, *(len(request.run) for request in requests))
    trees = _plant(requests, budget, share)
    # Longest first: running out of memory shows at once.
    trees.sort(key=lambda tree: (-len(tree.tokens), tree.tokens, tree.leaves[0].request))
    batches = []
    while trees:
        rows = max(budget // len(trees[0].tokens), 1)
        batches.append(_batch(trees[:rows], requests))
        trees = trees[rows:]
    return batches


def arranged(requests: list[Request], batches: list[list[list[int]]]) -> list[Batch]:
    """The batches that are given.

    Args:
        requests: in any order.
        batches: [batch][row][request], the longest row first; a row's requests run the same tokens.
    """
    known = _known(requests, _in_order(requests))
    found = []
    for batch in batches:
        trees = []
        for row in batch:
            tokens = requests[row[0]].run
            path = list(range(len(tokens)))
            leaves = [_leaf(one, requests[one], path, known[one]) for one in row]
            trees.append(Tree(tokens, path, leaves=leaves))
        found.append(_batch(trees, requests))
    return found


def _in_order(requests: list[Request]) -> list[tuple[int, list[int]]]:
    """The requests' numbers and what they run, in the order of these tokens."""
    return sorted(((i, one.run) for i, one in enumerate(requests)), key=lambda pair: pair[1])


def _known(requests: list[Request], order: list[tuple[int, list[int]]]) -> list[int]:
    """How many tokens of each request its document has brought before."""
    known = [0] * len(requests)
    brought: dict[int, list[int]] = {}  # the last request of each document
    for number, tokens in order:
        owner = requests[number].owner
        # In this order no earlier request of the document has more in common than the one before.
        known[number] = _common(brought.get(owner, []), tokens)
        brought[owner] = tokens
    return known


def _leaf(number: int, request: Request, path: list[int], known: int) -> Leaf:
    """The leaf of a request whose tokens are the nodes of `path`."""
    return Leaf(
        number,
        path[-1],
        path[known - 1] if known else -1,
        known,
        path[-request.scored :],
        list(request.tokens[-request.scored :]),
    )


def _plant(requests: list[Request], budget: int, share: bool) -> list[Tree]:
    trees: list[Tree] = []
    limit = 0
    before: list[int] = []
    path: list[int] = []  # nodes of the request before, root first
    order = _in_order(requests)
    known = _known(requests, order)
    for number, tokens in order:
        shared = _common(before, tokens)
        same = shared == len(tokens) == len(before)
        grown = len(trees[-1].tokens) + len(tokens) - shared if trees else 0
        worthwhile = share and shared >= WORTH_SHARING * len(tokens) and grown <= limit
        if not same and not worthwhile:
            trees.append(Tree())
            limit = min(max(GROWTH * len(tokens), SMALL_TREE), budget)
            shared, path = 0, []
        tree = trees[-1]
        next_node = len(tree.tokens)
        tree.closed.update(dict.fromkeys(path[shared:], next_node))
        path = [*path[:shared], *range(next_node, next_node + len(tokens) - shared)]
        tree.tokens += tokens[shared:]
        tree.depth += range(shared, len(tokens))
        tree.leaves.append(_leaf(number, requests[number], path, known[number]))
        before = tokens
    return trees


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    alike, beyond = 0, min(len(one), len(other)) + 1
    # Halving, by comparisons of slices: most pairs are long and differ near their end.
    while beyond - alike > 1:
        middle = (alike + beyond) // 2
        if one[alike:middle] == other[alike:middle]:
            alike = middle
        else:
            beyond = middle
    return alike


def _batch(trees: list[Tree], requests: list[Request]) -> Batch:
    longest = len(trees[0].tokens)
    shape = (len(trees), longest)
    tokens, depth = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    # Padding sees itself, since a softmax over nothing is NaN.
    ends = np.tile(np.arange(1, longest + 1), (len(trees), 1))
    leaves: list[tuple[int, Leaf]] = []
    for row, tree in enumerate(trees):
        length = len(tree.tokens)
        tokens[row, :length] = tree.tokens
        depth[row, :length] = tree.depth
        ends[row, :length] = length
        ends[row, list(tree.closed)] = list(tree.closed.values())
        leaves += [(row * longest, leaf) for leaf in tree.leaves]
    predictions = np.concatenate([start + np.array(leaf.scored) for start, leaf in leaves])
    scored, row_of = np.unique(predictions, return_inverse=True)
    owners = [requests[leaf.request].owner for _, leaf in leaves]
    documents, owner_of = np.unique(owners, return_inverse=True)
    counts = [len(leaf.scored) for _, leaf in leaves]
    return Batch(
        tokens=tokens,
        lengths=np.array([len(tree.tokens) for tree in trees]),
        depth=depth,
        ends=ends,
        branched=any(tree.depth[-1] != len(tree.depth) - 1 for tree in trees),
        requests=[leaf.request for _, leaf in leaves],
        owners=owner_of,
        documents=documents.tolist(),
        last=np.array([start + leaf.node for start, leaf in leaves]),
        known=np.array([start + leaf.known if leaf.known >= 0 else -1 for start, leaf in leaves]),
        run=np.array([len(requests[leaf.request].run) for _, leaf in leaves]),
        counted=np.array([int(requests[leaf.request].counted) for _, leaf in leaves]),
        brought=np.array([leaf.brought for _, leaf in leaves]),
        scored=scored,
        row=row_of,
        targets=np.array([token for _, leaf in leaves for token in leaf.targets]),
        firsts=np.cumsum([0, *counts[:-1]]),
    )
