"""Gated FFNs of random weights, rules that drop a wanted share, and how long both take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from sparsity_atlas.decoding.backend import activated, backend_of
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.terms import TENSORS

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.decoding.maps import GatedFFN

# Bytes of weights that one round meets: at 89 % zeros, too, twice what the last cache of an H200 holds.
COLD = {"cuda": 1e9, "cpu": 600e6}
# Rounds of a timing at the least, however long they take.
FEWEST = 3


class Time(NamedTuple):
    """Microseconds a call: the median, and the distance between the quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> Time:
        """Time of one of some calls that run one after another, from what some rounds of all took."""
        low, median, high = statistics.quantiles([one * 1e6 / calls for one in seconds], n=4)
        return cls(median, high - low)

    def __str__(self) -> str:
        return f"{self.median:8.1f} ±{self.spread:4.1f}"


def rounds_of(most: int, longest: float = math.inf) -> Iterator[None]:
    """The rounds of a timing: so many, or `FEWEST` and what more begins within so many seconds."""
    begun = time.perf_counter()
    for done in range(most):
        if done >= FEWEST and time.perf_counter() - begun > longest:
            return
        yield


def timed(
    calls: Sequence[Callable[[], object]],
    device: str,
    repeats: int = 20,
    longest: float = math.inf,
) -> Time:
    """Time of one of some calls that run one after another, each with weights of its own.

    On a GPU all of them are one captured graph, so that the host sets no pace. On a CPU one thread's time
    is its own, which other work hardly changes; that of several is the clock's.

    Args:
        calls: of a round.
        device: `cpu` or `cuda`.
        repeats: rounds on a GPU; on a CPU half as many.
        longest: seconds of all rounds on a CPU, as `rounds_of` counts them.
    """
    for call in calls:
        call()
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        times = []
        for _ in rounds_of(max(2, repeats // 2), longest):
            start = clock()
            for call in calls:
                call()
            times.append(clock() - start)
    else:
        times = _replays(calls, repeats)
    return Time.of(times, len(calls))


def _replays(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def layers_of(weights: int, dtype: torch.dtype, device: str, cold: float | None = None) -> int:
    """How many layers of so many weights are met in a round, so that caches are cold.

    Args:
        weights: of a layer.
        dtype: of them.
        device: its kind.
        cold: bytes to meet; None: `COLD`.
    """
    fewest = 3 if device == "cuda" else 1
    wanted = COLD[device] if cold is None else cold
    return max(fewest, round(wanted / (weights * dtype.itemsize)))


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """A weight [rows, columns] that keeps the size of what it multiplies."""
    made = torch.randn(rows, columns, device=device) / math.sqrt(columns)
    return made.to(dtype)


def fixed(values: Tensor, sparsity: float) -> Threshold:
    """The constant that drops this share of some entries, between two of them."""
    ranked = values.abs().float().flatten().sort().values
    rank = min(max(int(sparsity * len(ranked)), 1), len(ranked) - 1)
    cut = ranked[rank - 1 : rank + 1].mean() if sparsity > 0 else 0 * ranked[0]
    return Threshold("fixed", constants=cut[None])


def share_of_mass(values: Tensor, sparsity: float) -> Threshold:
    """Top-p that drops about this share of some entries."""
    ranked = values.abs().float().sort(-1, descending=True).values
    kept = min(max(int((1 - sparsity) * ranked.shape[-1]), 1), ranked.shape[-1])
    # In the middle of an entry, so that rounding moves none across.
    shares = (ranked[:, :kept].sum(-1) - ranked[:, kept - 1] / 2) / ranked.sum(-1)
    return Threshold("share", float(shares.mean()) if sparsity > 0 else 1.0)


# How a threshold comes about: it is there beforehand, or found at each token.
RULES: dict[str, Callable[[Tensor, float], Threshold]] = {"fixed": fixed, "top-p": share_of_mass}


def unread(mask: Tensor) -> float:
    """Share of the rows of weights that no token keeps: mask [tokens, width]."""
    return float((~mask).all(0).float().mean())


def realised(dense: float, sparse: float, share: float) -> float | None:
    """The realised share; None where next to nothing is left out."""
    return (1 - sparse / dense) / share if share > 0.02 else None


def rules_of(
    x: Tensor, ffn: GatedFFN, site: str, find: Callable[[Tensor, float], Threshold], sparsity: float
) -> tuple[dict[str, Threshold], float]:
    """Rules of a layer that drop a share of each tensor, and the share of its weights that stays unread."""
    rules, share, seen = {}, 0.0, x
    for tensor in TENSORS[site]:
        if tensor == "input":
            values = x
        else:
            u, g = F.linear(seen, ffn.up), activated(F.linear(seen, ffn.gate), ffn.activation)
            values = {"up": u, "gate": g, "intermediate": u * g}[tensor]
        rules[tensor] = find(values, sparsity)
        mask = rules[tensor].mask(values)
        # Of three maps that are equally large.
        share += unread(mask) * (1 if tensor == "intermediate" else 2) / 3
        seen = torch.where(mask, values, 0) if tensor == "input" else seen
    return rules, share


def dense_ffn(x: Tensor, ffn: GatedFFN) -> Tensor:
    """By the library's products."""
    gates = activated(F.linear(x, ffn.gate), ffn.activation)
    return F.linear(gates * F.linear(x, ffn.up), ffn.down)


def own_ffn(x: Tensor, ffn: GatedFFN) -> Tensor:
    """By our kernels, with nothing dropped."""
    backend = backend_of(x, ffn.up)
    if backend is None:
        return dense_ffn(x, ffn)
    return F.linear(backend.factors(x, ffn.up, ffn.gate, ffn.activation), ffn.down)
