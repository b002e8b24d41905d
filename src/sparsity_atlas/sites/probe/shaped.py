"""What a model does to u and to the gate before their product, told from numbers that were put in for both.

Of i = u ⊙ g, where u is a within bounds and with an offset, and g is σ of b within bounds or cut, a and b are
known and i is seen. A module that is σ shows what it was given. Else σ is one of those whose quotient
i / σ(b), where b is small, depends on a as bounds and an offset do; then u is known, and i / u shows where g
stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.probe.hypotheses import Call, relative_error, tolerance
from sparsity_atlas.sites.shaping import PLAIN, Shaping

# Up to where the gate's argument counts as small: bounds that are in use lie beyond one of them.
_SMALL = (6.0, 3.0, 1.5)
# A quotient by less than this is rounding.
_LEAST = 0.05
# What lies so much beyond a bound is surely held back by it.
_BEYOND = 1.02
# Columns that are looked at, of a wide layer some of each region.
_COLUMNS = 512
# Halvings until float32 holds nothing finer.
_HALVINGS = 40
# Entries that show a bound, or a row's cut, at least.
_SHOWN = 3

Function = Callable[[Tensor], Tensor]


def shapings(
    i: Tensor, up: Tensor, gate: Tensor, functions: Mapping[str, Function], calls: list[Call]
) -> Iterator[tuple[Activation, Shaping]]:
    """Ways to read i as shaped(up) ⊙ σ(shaped(gate)), each for the caller to prove on all entries.

    Args:
        i: [tokens, d_ff].
        up: what was put in for W_u x, of the same shape.
        gate: what was put in for W_g x.
        functions: by name, those that σ may be.
        calls: of modules that may be σ, the last ones first.
    """
    limit = tolerance(i.dtype)
    for call in calls:
        before = _given(call.input, gate)
        if before is not None:
            made = call.output.float()
            seen = made.abs() > _LEAST
            shaping = _bounds(up.float()[seen], i.float()[seen] / made[seen], limit)
            if shaping is not None:
                yield (
                    Activation(call.path, call.module.forward, call.path, call.module, before),
                    shaping,
                )
    step = max(1, i.shape[-1] // _COLUMNS)
    few, a, b = (one[:, ::step].flatten().float() for one in (i, up, gate))
    for small in _SMALL:
        for name, function in functions.items():
            found = _by_function(few, a, b, function, small, limit)
            if found is not None:
                yield Activation(name, function, before=found[1]), found[0]


def _by_function(
    i: Tensor, a: Tensor, b: Tensor, function: Function, small: float, limit: float
) -> tuple[Shaping, Shaping] | None:
    """Shapings of u and of the gate if σ is this function; entries [n] of a, b and i."""
    g = function(b)
    seen = (b <= small) & (g.abs() > _LEAST)
    shaping = _bounds(a[seen], i[seen] / g[seen], limit)
    if shaping is None or relative_error(i[seen], shaping(a[seen]) * g[seen]) > limit:
        return None
    u = shaping(a)
    seen = (u.abs() > 10 * _LEAST) & (b > small)
    still = seen & (i / u < g - 3 * limit * g.abs())
    if int(still.sum()) < _SHOWN:
        return shaping, PLAIN
    level = (i[still] / u[still]).median()
    low, high = torch.zeros_like(level), b.max()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = function(middle) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return shaping, Shaping(high=_round(float(high), limit))


def _bounds(a: Tensor, u: Tensor, limit: float) -> Shaping | None:
    """The bounds and the offset that make u [n] of a [n]; None if none do."""
    if len(a) < 4 * _SHOWN:
        return None
    near = a.abs() <= a.abs().quantile(0.25) if len(a) < 2**20 else a.abs() <= 1
    plus = float((u - a)[near].median())
    plus = _round(plus, 10 * limit) if abs(plus) > _LEAST else 0.0
    v = u - plus
    ends: list[float | None] = []
    for sign in (-1, 1):
        held = sign * a > _BEYOND * float((sign * v).max())
        if int(held.sum()) < _SHOWN:
            ends.append(None)
            continue
        ends.append(_round(float(v[held].median()), limit))
    shaping = Shaping(low=ends[0], high=ends[1], plus=plus)
    return shaping if relative_error(u, shaping(a)) <= 10 * limit else None


def _given(read: Tensor, gate: Tensor) -> Shaping | None:
    """What makes of numbers put in for a gate [tokens, d_ff] those that a module read; None if none does."""
    if read.shape != gate.shape or read.device != gate.device:
        return None
    low, high = float(read.min()), float(read.max())
    bounds = Shaping(
        low=None if low == float(gate.min()) else low,
        high=None if high == float(gate.max()) else high,
    )
    if torch.equal(read, bounds(gate)):
        return bounds
    return _cut(read, gate)


def _cut(read: Tensor, gate: Tensor) -> Shaping | None:
    if bool((read < 0).any()) or bool((read > 0).all()):
        return None
    left, values = read > 0, gate.float()
    rows = left.sum(-1) > 0
    if int(left.sum()) < _SHOWN:
        return None
    level = torch.where(left, values - read.float(), 0).sum(-1)[rows] / left.sum(-1)[rows]
    spread = values.std(-1, unbiased=False)[rows]
    k = ((level - values.mean(-1)[rows]) / spread).median()
    if not bool(k.isfinite()):
        return None
    around = [k]
    if gate.dtype != torch.float32:
        # All of it is rounded, k too: one of the next numbers of that type.
        step = float(k.abs()) * torch.finfo(gate.dtype).eps
        around += [(k + n * step / 2).to(gate.dtype) for n in range(-8, 9)]
    tried = [Shaping(cut=float(one)) for one in around]
    return min(tried, key=lambda one: relative_error(read, one(gate)))


def _round(value: float, limit: float) -> float:
    """The nearest number of three digits, if rounding explains the difference."""
    near = float(f"{value:.3g}")
    return near if abs(near - value) <= limit * abs(value) else value
