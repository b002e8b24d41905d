"""The threshold of one row, compiled with Numba.

It is found on the bit patterns of the row's scores, which sort like integers. `_bracket` narrows an
interval of them by interpolation, with float32 sums that vectorise; a comparison that lies within the sums'
error is never believed. What is left between its ends is settled by `_settled` with the integer masses of the
definition. The masks are those of `Threshold.mask`, bit for bit.

All compiled functions stand in this one file: Numba keeps what it compiled for as long as the file of the
outermost function is the same, and would not see an edit of another one.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sparsity_atlas.kernels.definition import LARGEST_EXACT_POWER, LIMB_BITS, LIMBS

KINDS = {"share": 0, "rank": 1, "peak": 2, "fixed": 3}
_SHARE, _RANK, _PEAK, _FIXED = KINDS.values()
# A float32 sum over a block, in any order, is off by at most _BLOCK roundings of 2^-24.
_BLOCK = 512
_ERROR = 2.0**-14
# In float64 what counts is that `mass` is rounded to float32 if it is a power, and to integers in the
# definition: at most 2^-19 of the total at the largest width.
_CLOSE_ERROR = 2.0**-18
_SCAN = 64
_FEW = 48  # entries that are cheaper to sort than to search
_INFINITY = 0x7F800000  # the bit pattern; NaN lies above
_BINADE = 1 << 23

_compiled = njit(nogil=True, cache=True, error_model="numpy")
# The order of a sum is free here and nowhere else.
_reordered = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})


@_compiled
def mask_rows(
    values,
    onto,
    out,
    zeros,
    finite,
    weights,
    constants,
    kind,
    amount,
    limbs,
    power,
    scale,
    half,
    first,
    last,
):
    """Mask rows [first, last); the arguments are those of `cpu.masked`, as bits and numbers."""
    width = values.shape[1]
    score = np.empty(width, dtype=np.float32)
    key = score.view(np.int32)
    mass = np.empty(width, dtype=np.float32)
    few = np.empty(width, dtype=np.int32)
    wide = np.empty(width, dtype=np.float64)
    square = np.empty(width, dtype=np.float64)
    cell = np.empty(1, dtype=np.float32)
    cuts = constants.view(np.int32)
    lattice = 1
    if values.itemsize == 2 and len(weights) == 0:
        lattice = 1 << 13 if half else 1 << 16
    for row in range(first, last):
        peak = _load(values[row], weights, half, score, key)
        finite[row] = peak < _INFINITY
        if peak < _INFINITY and kind == _FIXED and len(cuts) > 1:
            zeros[row] = _write_by_channel(values[row], onto[row], out[row], key, cuts)
            continue
        least = 0
        if peak < _INFINITY:
            if kind == _FIXED:
                least = cuts[0]
            elif kind == _PEAK:
                least = _rounded_up(amount * _number(peak, cell), cell)
            elif kind == _RANK:
                least = _ranked(key, few, cell, peak, lattice, int(amount))
            elif amount < 1 and peak > 0:
                least = _shared(
                    *(score, key, mass, few, wide, square, cell),
                    *(peak, lattice, amount, limbs, power, scale),
                )
        zeros[row] = _write(values[row], onto[row], out[row], key, least)


@_compiled
def _load(values, weights, half, score, key):
    """Scores of a row into `score` (and its view `key`); returns the largest bit pattern."""
    width = len(values)
    if values.itemsize == 4:
        for j in range(width):
            key[j] = values[j] & 0x7FFFFFFF
    elif half:
        # The exponents' biases differ by 112; denormals come out right, infinity and NaN do not.
        for j in range(width):
            key[j] = (np.int32(values[j]) & 0x7FFF) << 13
        for j in range(width):
            score[j] *= np.float32(2.0**112)
        for j in range(width):
            if (np.int32(values[j]) & 0x7FFF) >= 0x7C00:
                key[j] = _INFINITY
    else:
        for j in range(width):
            key[j] = (np.int32(values[j]) & 0x7FFF) << 16
    if len(weights) > 0:
        for j in range(width):
            score[j] *= weights[j]
        for j in range(width):
            key[j] &= 0x7FFFFFFF
    peak = np.int32(0)
    for j in range(width):
        peak = max(peak, key[j])
    return peak


@_compiled
def _write(values, onto, out, key, least):
    """Keep what has at least this bit pattern; returns the zeros at the site."""
    zeros = np.int32(0)
    magnitude = 0x7FFF if values.itemsize == 2 else 0x7FFFFFFF
    bound = np.int32(least)
    for j in range(len(values)):
        kept = key[j] >= bound
        out[j] = onto[j] if kept else 0
        zeros += np.int32((not kept) | (values[j] & magnitude == 0))
    return zeros


@_compiled
def _write_by_channel(values, onto, out, key, cuts):
    """As `_write`, with a bit pattern for each channel."""
    zeros = np.int32(0)
    magnitude = 0x7FFF if values.itemsize == 2 else 0x7FFFFFFF
    for j in range(len(values)):
        kept = key[j] >= cuts[j]
        out[j] = onto[j] if kept else 0
        zeros += np.int32((not kept) | (values[j] & magnitude == 0))
    return zeros


@_compiled
def _pattern(number, cell):
    """Bit pattern of a number as float32."""
    cell[0] = number
    return np.int64(cell.view(np.int32)[0])


@_compiled
def _number(pattern, cell):
    """The float32 with a bit pattern."""
    cell.view(np.int32)[0] = pattern
    return np.float64(cell[0])


@_compiled
def _rounded_up(exact, cell):
    """Bit pattern of the least float32 that is not below a float64."""
    pattern = _pattern(exact, cell)
    return pattern + 1 if _number(pattern, cell) < exact else pattern


@_compiled
def _ranked(key, few, cell, peak, lattice, rank):
    """Bit pattern of the `rank`-th largest score."""
    width = len(key)
    if rank == 0:
        return np.int64(_INFINITY)
    if rank == width:
        return np.int64(0)
    # As if magnitudes fell off exponentially; a bad guess costs a few passes.
    mean = 0.0
    for j in range(0, width, 16):
        mean += _number(key[j], cell)
    mean /= (width + 15) // 16
    guess = _pattern(mean * math.log(width / rank), cell)
    low, high = _bracket(
        *(key, key.view(np.float32), cell, True, rank, width),
        *(0, peak + lattice, guess, lattice, 1.0, 1.0),
    )
    if high - low == lattice:
        return low
    count = _between(key, few, low, high)
    return np.int64(few[count - (rank - _count_from(key, high))])


@_compiled
def _shared(score, key, mass, few, wide, square, cell, peak, lattice, amount, limbs, power, scale):
    """Bit pattern of the largest score whose reachers hold the share `amount` of the mass."""
    width = len(score)
    largest = _number(peak, cell)
    unit = largest
    if power <= LARGEST_EXACT_POWER:
        unit = math.ldexp(1.0, math.frexp(largest)[1])
    measure = unit  # of `mass`: equal to 1 where the scores themselves can be added
    if power != 1:
        _raise_row(score, unit, power, wide, square)
        for j in range(width):
            mass[j] = wide[j]
    elif 2.0**-40 < largest < 2.0**64:
        mass, measure = score, 1.0
    else:
        for j in range(width):
            mass[j] = score[j] / unit
    total = _mass_from_closely(key, mass, 0)
    low, high = 0, peak + lattice
    if 1 - amount > 2.0**-10:
        # All that lies below a mass m weighs less than width · m: surely low enough, errors included.
        spare = (1 - amount) * total / width
        low = _pattern(measure * (0.99 * spare) ** (1 / power), cell)
    typical = 2 * (1 - amount) ** 0.6 * total / width
    guess = _pattern(min(measure * typical ** (1 / power), largest), cell)
    low = min(low - low % lattice, peak)
    low, high = _bracket(
        *(key, mass, cell, False, amount * total, total),
        *(low, high, guess, lattice, measure, power),
    )
    if high - low == lattice:
        return low
    if power == 1:
        for j in range(width):
            wide[j] = score[j] / unit
    return _settled(key, few, wide, cell, low, high, limbs, power, scale, unit)


@_compiled
def _raise_row(score, unit, power, wide, square):
    """As `definition.raised`, of score / unit, into `wide`."""
    whole = int(power)
    fraction = power - whole
    for j in range(len(score)):
        square[j] = score[j] / unit
        wide[j] = 1.0
    while whole > 0:
        if whole % 2 == 1:
            for j in range(len(score)):
                wide[j] *= square[j]
        for j in range(len(score)):
            square[j] *= square[j]
        whole //= 2
    if fraction > 0:
        for j in range(len(score)):
            square[j] = score[j] / unit
    while fraction > 0:
        for j in range(len(score)):
            square[j] = math.sqrt(square[j])
        fraction *= 2
        if fraction >= 1:
            for j in range(len(score)):
                wide[j] *= square[j]
            fraction -= 1


@_reordered
def _block_from(key, mass, bound):
    part = np.float32(0)
    for j in range(len(key)):
        part += mass[j] if key[j] >= bound else np.float32(0)
    return part


@_compiled
def _mass_from(key, mass, least):
    """Sum of the masses whose bit pattern is at least `least`, in float32 by blocks."""
    total = 0.0
    bound = np.int32(least)
    # A function of its own for the block: inside this loop it would not vectorise.
    for start in range(0, len(key), _BLOCK):
        total += _block_from(key[start : start + _BLOCK], mass[start : start + _BLOCK], bound)
    return total


@_reordered
def _mass_from_closely(key, mass, least):
    """As `_mass_from`, in float64."""
    total = 0.0
    bound = np.int32(least)
    for j in range(len(key)):
        total += np.float64(mass[j]) if key[j] >= bound else 0.0
    return total


@_compiled
def _count_from(key, least):
    """Number of bit patterns that are at least `least`."""
    count = np.int32(0)
    bound = np.int32(least)
    for j in range(len(key)):
        count += np.int32(key[j] >= bound)
    return count


@_compiled
def _bracket(key, mass, cell, counting, target, total, low, high, guess, lattice, measure, power):
    """Narrow [low, high): what reaches `low` holds the target, what reaches `high` does not.

    Regula falsi (Illinois) on bit patterns: those are nearly logarithms, over which running sums are
    smooth. Ends at one cell of the lattice, at few entries, or where the sums' error hides the answer.

    Args:
        key: bit patterns.
        mass: float32, of each entry.
        cell: room for one number.
        counting: count entries instead of adding `mass`.
        target: what the entries that reach the threshold must hold.
        total: what all entries hold.
        low: rigorous, or 0.
        high: rigorous.
        guess: where to look first.
        lattice: all bit patterns are multiples of it.
        measure: `mass` is (score / measure)^power.
        power: see `measure`.
    """
    at_low, at_high = float(total), 0.0
    above, below = at_low - target, -float(target)
    side, step, tries = 0, 2 * _BINADE, 0
    while high - low > lattice:
        tries += 1
        if tries == 1:
            middle = np.int64(guess)
        elif low == 0:
            middle = np.int64(high - step)
            step *= 2
        elif tries > 12 and tries % 2 == 0:
            middle = (low + high) // 2
        else:
            middle = low + np.int64((high - low) * (above / (above - below)))
        middle = min(max(middle - middle % lattice, low + lattice), high - lattice)
        if counting:
            found = float(_count_from(key, middle))
        else:
            found = _mass_from(key, mass, middle)
            if abs(found - target) < _ERROR * (found + target):
                found = _mass_from_closely(key, mass, middle)
                if abs(found - target) < _CLOSE_ERROR * (found + target):
                    break
        if found >= target:
            low, at_low, above = middle, found, found - target
            if side == 1:
                below *= 0.5
            side = 1
        else:
            high, at_high, below = middle, found, found - target
            if side == -1:
                above *= 0.5
            side = -1
        # Each entry between the two has at least the mass of one at `low`.
        if lattice == 1 and low > 0:
            one = 1.0 if counting else (_number(low, cell) / measure) ** power
            if at_low - at_high <= _FEW * one:
                break
    return low, high


@_compiled
def _any_between(key, low, high):
    found = np.int32(0)
    for j in range(len(key)):
        found |= np.int32((key[j] >= low) & (key[j] < high))
    return found != 0


@_compiled
def _between(key, few, low, high):
    """Bit patterns in [low, high) in ascending order, at the start of `few`; returns how many."""
    count = 0
    first, last = np.int32(low), np.int32(high)
    for start in range(0, len(key), _SCAN):
        block = key[start : start + _SCAN]
        # Most blocks have none, which a vectorised look tells.
        if _any_between(block, first, last):
            for j in range(len(block)):
                if first <= block[j] < last:
                    few[count] = block[j]
                    count += 1
    few[:count].sort()
    return count


@_compiled
def _share_of(total, limbs):
    """⌈amount · total⌉ from the digits of `definition.limbs`: a long multiplication."""
    mask = (np.int64(1) << LIMB_BITS) - 1
    upper, lower = total >> LIMB_BITS, total & mask
    carry, rest = np.int64(0), np.int64(0)
    for place in range(LIMBS - 1, -1, -1):
        column = limbs[place] * lower + carry
        if place < LIMBS - 1:
            column += limbs[place + 1] * upper
        rest |= column & mask
        carry = column >> LIMB_BITS
    return limbs[0] * upper + carry + (1 if rest != 0 else 0)


@_compiled
def _settled(key, few, wide, cell, low, high, limbs, power, scale, unit):
    """The threshold between `low` and `high`, by the integer masses of `definition.masses`."""
    total = np.int64(0)
    above = np.int64(0)
    bound = np.int32(high)
    for j in range(len(key)):
        whole = np.int64(wide[j] * scale)
        total += whole
        above += whole if key[j] >= bound else 0
    target = min(max(_share_of(total, limbs), 1), total)
    count = _between(key, few, low, high)
    square = np.empty(1, dtype=np.float64)
    one = np.empty(1, dtype=np.float64)
    for index in range(count - 1, -1, -1):
        _number(few[index], cell)
        _raise_row(cell, unit, power, one, square)
        above += np.int64(one[0] * scale)
        if above >= target:
            return np.int64(few[index])
    return np.int64(low)
