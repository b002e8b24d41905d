"""The two factors of a gate that is a function of the model's own: found and proved by numbers alone.

A gated experts module makes i = A(z) of z [S, 2w], the output of one projection; the function A is its own:
it may cut, cap, shift, and take its two halves one behind the other or in turn. It is u ⊙ g if each entry of
i depends on two of z, a and b, and A(a, b) = g(a) · u(b). Which two: the derivative of Σ_j v_j i_j for two
vectors v says of each entry of z which j it goes into. Which is which: u is all but affine where its
argument is small, g is not. The scale: u has slope 1 at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsity_atlas.errors import AtlasError

# In float64; a gate that computes in float32 inside passes as well, what does not factor misses by far more.
TOLERANCE = 1e-5
# Where u is looked for: caps and cuts that are in use lie beyond.
_NEAR = tuple(k / 2 for k in range(-12, 13))
_FAR = (-1000.0, -60.0, -15.0, -8.0, 8.0, 15.0, 60.0, 1000.0)
# Where the slope of u is taken, and where its argument stands while g is observed: exact in each type.
_STEP, _STILL = 2.0**-6, 1.0
_ANCHORS = (1.0, 2.0, 3.0, 4.0, 0.5, -1.0)

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Columns:
    """Every `step`-th column of z from `start`."""

    start: int
    step: int

    def of(self, z: Tensor) -> Tensor:
        """These columns [..., w] of z [..., 2w]: a view."""
        width = z.shape[-1] // 2
        return z[..., self.start : self.start + self.step * (width - 1) + 1 : self.step]


@dataclass(frozen=True)
class Gating:
    """How i = A(z) is u ⊙ g.

    Attributes:
        linear: where u's argument b lies in z.
        nonlinear: where g's argument a lies.
        plain: whether u is b itself.
        anchor: an a, for which A(a, b) = slope · u(b).
        slope: g(anchor).
        still: u(1), so that A(a, 1) = still · g(a).
    """

    linear: Columns
    nonlinear: Columns
    plain: bool
    anchor: float
    slope: float
    still: float

    def up(self, gate: Function, z: Tensor) -> Tensor:
        """u [S, w].

        Args:
            gate: the module's A.
            z: [S, 2w], not changed.
        """
        if self.plain:
            return self.linear.of(z)
        made = z.clone()
        self.nonlinear.of(made).fill_(self.anchor)
        return gate(made) / self.slope

    def gate(self, gate: Function, z: Tensor) -> Tensor:
        """g [S, w]; see `up`."""
        made = z.clone()
        self.linear.of(made).fill_(_STILL)
        made = gate(made)
        return made if self.still == 1 else made / self.still

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bind_gating(entry: dict[str, Any]) -> Gating:
    """`Gating.describe()` back."""
    columns = {name: Columns(**entry[name]) for name in ("linear", "nonlinear")}
    return Gating(**(entry | columns))


def find_gating(gate: Function, width: int, device: torch.device, where: str) -> Gating:
    """Find and prove the two factors.

    Args:
        gate: A, [S, 2w] to [S, w].
        width: w.
        device: where A computes.
        where: how messages name it.

    Raises:
        AtlasError: A has no such form.
    """

    def call(z: Tensor) -> Tensor:
        return gate(z.to(device)).double()

    first, second = _layout(call, width, where)
    pairs = _pairs(call, width, first, second)
    bends = [_bend(pairs), _bend(pairs.T)]  # of the first argument, of the second
    if not min(bends) < max(bends) / 2:
        raise AtlasError(
            f"{where}: which factor of its gate is u cannot be told: both are {_kind(bends)} functions"
        )
    linear, nonlinear = (second, first) if bends[1] < bends[0] else (first, second)
    gating = _scaled(call, width, linear, nonlinear, where)
    _prove(call, gating, width, where)
    return gating


def _kind(bends: list[float]) -> str:
    return "affine" if max(bends) < TOLERANCE else "curved"


def _layout(call: Function, width: int, where: str) -> tuple[Columns, Columns]:
    """The two columns that each entry depends on, as two rules."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(4, 2 * width, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    wide = torch.randn(z.shape, generator=generator, dtype=torch.float64) * 20
    before = wide.clone()
    call(wide)
    if not torch.equal(wide, before):
        raise AtlasError(f"{where}: its gate overwrites its input")
    one, numbered = torch.ones(width), torch.arange(1, width + 1)
    with torch.enable_grad():
        z.requires_grad_()
        made = call(z)
        if made.shape != (4, width):
            raise AtlasError(f"{where}: its gate makes {list(made.shape)} of {list(z.shape)}")
        slopes = []
        for weights in (one, numbered):
            total = (made * weights.to(made)).sum()
            slopes.append(torch.autograd.grad(total, z, retain_graph=True)[0])
    ratio = slopes[1] / slopes[0]
    number = ratio.mean(0).round()
    if not bool(((ratio - number).abs() < 1e-3).all()):
        raise AtlasError(f"{where}: its gate does not make each entry of two entries of its input")
    order = torch.argsort(number, stable=True).view(width, 2)
    spelled = torch.arange(1, width + 1, dtype=number.dtype)[:, None].expand(width, 2)
    if not torch.equal(number[order], spelled):
        raise AtlasError(f"{where}: its gate does not make each entry of two entries of its input")
    return _rule(order[:, 0], where), _rule(order[:, 1], where)


def _rule(columns: Tensor, where: str) -> Columns:
    start = int(columns[0])
    step = int(columns[1]) - start if len(columns) > 1 else 1
    if step < 1 or columns.tolist() != [start + step * k for k in range(len(columns))]:
        raise AtlasError(f"{where}: its gate takes the entries of its input in no regular order")
    return Columns(start, step)


def _pairs(call: Function, width: int, first: Columns, second: Columns) -> Tensor:
    """A over a grid of its two arguments: [first, second]."""
    grid = torch.tensor(_NEAR, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    return _at(call, _laid(width, first, a), _laid(width, second, b)).view(a.shape)


@dataclass(frozen=True)
class _Laid:
    """Numbers laid into columns of one kind, row by row, the first of them again where they end."""

    columns: Columns
    rows: Tensor
    count: int


def _laid(width: int, columns: Columns, numbers: Tensor) -> _Laid:
    rows = -(-numbers.numel() // width)
    again = torch.arange(rows * width) % numbers.numel()
    return _Laid(columns, numbers.flatten()[again].view(rows, width), numbers.numel())


def _at(call: Function, *laid: _Laid) -> Tensor:
    """A of numbers that are laid out alike: [numbers]."""
    z = _filled(*laid)
    return call(z).cpu().flatten()[: laid[0].count]


def _filled(*laid: _Laid) -> Tensor:
    rows, width = laid[0].rows.shape
    z = torch.zeros(rows, 2 * width, dtype=torch.float64)
    for one in laid:
        one.columns.of(z).copy_(one.rows)
    return z


def _bend(pairs: Tensor) -> float:
    """How far from affine A is in its first argument: the residual's share, at the largest second."""
    values = pairs[:, pairs.abs().amax(0).argmax()]
    line = torch.stack([torch.tensor(_NEAR).to(values), torch.ones_like(values)], 1)
    rest = values - line @ torch.linalg.lstsq(line, values[:, None]).solution[:, 0]
    return float(rest.norm() / values.norm())


def _scaled(call: Function, width: int, linear: Columns, nonlinear: Columns, where: str) -> Gating:
    """u with slope 1 at 0, and g with what is left."""

    def factor(b: Tensor, anchor: float) -> Tensor:
        a = torch.full_like(b, anchor)
        return _at(call, _laid(width, linear, b), _laid(width, nonlinear, a))

    best = Gating(linear, nonlinear, False, 0.0, 0.0, 0.0)
    for anchor in _ANCHORS:
        points = torch.tensor([-_STEP, _STEP, _STILL], dtype=torch.float64)
        low, high, still = factor(points, anchor).tolist()
        slope = (high - low) / (2 * _STEP)
        if abs(slope) > abs(best.slope):
            best = replace(best, anchor=anchor, slope=slope, still=still / slope)
    if abs(best.slope) < TOLERANCE or abs(best.still) < TOLERANCE:
        raise AtlasError(f"{where}: the factors of its gate vanish where they are looked for")
    every = torch.tensor(_NEAR + _FAR, dtype=torch.float64)
    u = factor(every, best.anchor) / best.slope
    plain = bool((u - every).abs().le(TOLERANCE * every.abs()).all())
    still = 1.0 if abs(best.still - 1) < TOLERANCE else best.still
    return replace(best, plain=plain, still=still)


def _prove(call: Function, gating: Gating, width: int, where: str) -> None:
    """A = u ⊙ g: over a grid, and over random entries of all columns."""
    every = torch.tensor(_NEAR + _FAR, dtype=torch.float64)
    a, b = torch.meshgrid(every, every, indexing="ij")
    grid = _filled(_laid(width, gating.nonlinear, a), _laid(width, gating.linear, b))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(16, 2 * width, generator=generator, dtype=torch.float64) * 4
    for z in (grid, drawn):
        made = call(z).cpu()
        u, g = gating.up(call, z).cpu(), gating.gate(call, z).cpu()
        scale = made.abs() + (u * g).abs()
        off = (made - u * g).abs()
        if not bool((off <= TOLERANCE * scale + 1e-12 * scale.max()).all()):
            raise AtlasError(
                f"{where}: its gate is no product of a function of one entry and one of another: "
                f"{float(off.max()):.2g} off"
            )
