"""The rule that most criteria come down to: keep the entries whose score reaches a threshold.

A criterion that can say what it does in this form gets every compiled kernel for nothing. What is
defined here in plain torch is the reference, which the kernels reproduce bit for bit. So nothing in the
definition may depend on the order of a sum or on a library's rounding: scores are single float32
products, sums are sums of integers, and powers are made of multiplications and square roots, which
IEEE 754 rounds in one way only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

# Up to this power the largest entry's mass keeps at least as many bits as the power less.
LARGEST_EXACT_POWER = 8
# Digits of the base 2^LIMB_BITS that tell ⌈amount · total⌉ of any amount and of a total below 2^62: of a
# decimal that is a float64, either less than one is asked for, or the last place lies above 10^-36.
LIMBS, LIMB_BITS = 6, 31
# Bit patterns of infinity; those of NaN lie above, without their signs.
INFINITIES = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


Kind = Literal["share", "rank", "peak", "fixed"]


@dataclass(frozen=True, eq=False)
class Threshold:
    """Keep the entries whose score |v_j| · weights_j is at least the row's threshold t.

    The score is one float32 product (|v_j| itself without weights). t is

    - `share`: the largest score for which the entries that reach it hold `amount` of the row's mass
      Σ score^power; all is kept at `amount` 1. Mass is counted in integers, see `masses`; the target
      is ⌈amount · total⌉, exactly, and at least 1;
    - `rank`: the `amount`-th largest score; nothing is kept at `amount` 0;
    - `peak`: `amount` · (the row's largest score); exact for amounts of up to eight decimals, of others
      rounded in float64;
    - `fixed`: `constants`, one float32 for all or one for each channel.

    `amount` is the decimal that it is spelled as, the shortest that its float64 stands for: .55 of 100 is
    55, where its binary neighbour would ask for more.

    Entries that tie with t are kept. A row whose scores are not all finite is kept whole: callers
    report it. Values are float32, bfloat16 or float16.

    Attributes:
        kind: as above.
        amount: the rule's number.
        power: of the mass, at least 1; only `share` looks at it.
        weights: float32 [width], finite and not negative; None for 1.
        constants: float32, [width] or [1], not negative, perhaps infinite; only for `fixed`.
    """

    kind: Kind
    amount: float = 0.0
    power: float = 1.0
    weights: Tensor | None = None
    constants: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected {', '.join(get_args(Kind))}, found '{self.kind}'")
        if (self.constants is not None) != (self.kind == "fixed"):
            raise ValueError(f"constants: they belong to `fixed` alone, found kind '{self.kind}'")
        for name, allowed in (("weights", torch.isfinite), ("constants", lambda one: one == one)):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or tensor.dim() != 1:
                raise ValueError(
                    f"{name}: expected float32 of one dimension, found {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if not bool((allowed(tensor) & (tensor >= 0)).all()):
                raise ValueError(f"{name}: expected numbers that are not negative")

    def to(self, device: torch.device) -> Threshold:
        """The same rule with its tensors on a device."""
        weights, constants = (
            None if one is None else one.to(device).contiguous()
            for one in (self.weights, self.constants)
        )
        return replace(self, weights=weights, constants=constants)

    def scores(self, values: Tensor) -> Tensor:
        """|v| · weights in float32, of the shape of `values`."""
        score = values.abs().float()
        return score if self.weights is None else score * self.weights

    def mask(self, values: Tensor) -> Tensor:
        """Which entries are kept: the definition, written for reading and not for speed.

        Args:
            values: [rows, width].

        Returns:
            bool [rows, width].
        """
        score = self.scores(values)
        finite = torch.isfinite(score).all(-1, keepdim=True)
        score = torch.where(finite, score, 0)
        return (score >= self._least(score)) | ~finite

    def _least(self, score: Tensor) -> Tensor:
        """t of each row, float32 [rows, 1] (or what `constants` says for all rows)."""
        rows, width = score.shape
        match self.kind:
            case "fixed":
                assert self.constants is not None
                return self.constants
            case "rank" if self.amount == 0:
                return score.new_full((rows, 1), torch.inf)
            case "rank":
                return score.kthvalue(width - int(self.amount) + 1, dim=-1, keepdim=True).values
            case "peak":
                return rounded_up(score.amax(-1, keepdim=True).double() * not_above(self.amount))
            case _ if self.amount >= 1:
                return score.new_zeros((rows, 1))
        ranked = _descending(score)
        running = masses(ranked, self.power).cumsum(-1)
        total = running[:, -1:]
        target = _share_of(total, self.amount).clamp(min=1)
        crossing = (running < torch.minimum(target, total)).sum(-1, keepdim=True)
        return ranked.gather(-1, crossing)


def decimal(amount: float) -> Fraction:
    """The number that an amount is spelled as: its shortest decimal, and not the float64 beside it."""
    return Fraction(repr(float(amount)))


def not_above(amount: float) -> float:
    """The largest float64 that is not above the decimal `amount`.

    Its product with a float32, rounded to float64, lies on the same side of every float32 as the exact
    one does, if the decimal has at most eight places: an exact product then equals a float32 or is off
    by at least 1 / (10^8 · 2^24) of it, which is more than the two roundings take away.
    """
    return amount if Fraction(amount) <= decimal(amount) else math.nextafter(amount, -math.inf)


def limbs(amount: float) -> list[int]:
    """The first LIMBS digits of a decimal below 1 in base 2^LIMB_BITS, the largest first; see `LIMBS`."""
    whole = math.floor(max(decimal(amount), Fraction(0)) * (1 << LIMBS * LIMB_BITS))
    return [
        whole >> LIMB_BITS * (LIMBS - 1 - place) & (1 << LIMB_BITS) - 1 for place in range(LIMBS)
    ]


def _share_of(total: Tensor, amount: float) -> Tensor:
    """⌈amount · total⌉, int64 like `total`: a long multiplication of `limbs`, which reads no value."""
    low = (1 << LIMB_BITS) - 1
    upper, lower = total >> LIMB_BITS, total & low
    carry: Tensor | int = 0
    rest: Tensor | int = 0
    following = 0
    for limb in reversed(limbs(amount)):
        column = limb * lower + following * upper + carry
        rest = column & low | rest
        carry, following = column >> LIMB_BITS, limb
    return following * upper + carry + (rest != 0)


def masses(score: Tensor, power: float) -> Tensor:
    """score^power of each entry in integers, so that their sums are exact in any order.

    The unit makes the row's largest mass fill what int64 leaves room for when `width` of them are added:
    62 - bit length of the width, 49 bits at width 4,096. float32 scores down to 2^-25 of the largest
    are exact with power 1, smaller ones are rounded down at 2^-49.

    Args:
        score: float32 [rows, width], finite, not negative.
        power: at least 1.

    Returns:
        int64 [rows, width].
    """
    wide = score.double()
    peak = wide.amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(peak)
    # A power of two, so that nothing is rounded; beyond, the largest mass would lose too many bits.
    unit = peak / mantissa if power <= LARGEST_EXACT_POWER else peak
    share = wide / torch.where(peak > 0, unit, 1.0)
    return (raised(share, power) * 2.0 ** mass_bits(score.shape[-1])).long()


def mass_bits(width: int) -> int:
    """Bits of the largest mass in a row of this width."""
    return 62 - width.bit_length()


def raised(base: Tensor, power: float) -> Tensor:
    """base^power from multiplications and square roots alone, in the order of the power's binary digits.

    `pow` differs between libraries in the last bit; this is the same everywhere. A power with k binary
    digits behind the point costs k square roots.

    Args:
        base: float64, not negative.
        power: at least 1.
    """
    whole, fraction = int(power), power - int(power)
    result, square, root = torch.ones_like(base), base, base
    while whole > 0:
        if whole % 2 == 1:
            result = result * square
        square = square * square
        whole //= 2
    while fraction > 0:
        root = square_root(root)
        fraction *= 2
        if fraction >= 1:
            result = result * root
            fraction -= 1
    return result


def square_root(number: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 asks: on a CPU torch's own is off in the last bit now and then."""
    if number.device.type != "cpu":
        return number.sqrt()
    import numpy as np

    return torch.from_numpy(np.sqrt(number.numpy()))


def rounded_up(exact: Tensor) -> Tensor:
    """The least float32 that is not below a float64: a comparison with it is one with the float64."""
    nearest = exact.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, math.inf))
    return torch.where(nearest.double() < exact, above, nearest)


def _descending(score: Tensor) -> Tensor:
    """Sort each row in descending order.

    numpy's vectorised sort takes a third of the time of torch's on a CPU, and sorts the same.
    """
    if score.device.type != "cpu":
        return score.sort(dim=-1, descending=True).values
    ranked = score.numpy().copy()
    ranked.sort(axis=-1)
    return torch.from_numpy(ranked).flip(-1)
