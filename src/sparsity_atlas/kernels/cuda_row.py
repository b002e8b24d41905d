"""One row on CUDA: read it, search for its threshold, write it. Triton inlines these into the kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsity_atlas.kernels import definition

KINDS = {"share": 0, "rank": 1, "peak": 2, "fixed": 3}
SHARE, RANK, PEAK, FIXED = (tl.constexpr(kind) for kind in KINDS.values())
INFINITY = tl.constexpr(0x7F800000)  # the bit pattern; NaN lies above
_LEAST_REST = tl.constexpr(2.0**-24)  # of a sum: what its roundings leave to see
_LARGEST_RUN = tl.constexpr(20.0)  # of an inverse power; more is that of two tries in a gap
LIMBS, BITS = tl.constexpr(definition.LIMBS), tl.constexpr(definition.LIMB_BITS)
LOW_BITS = tl.constexpr((1 << definition.LIMB_BITS) - 1)
GROUP = tl.constexpr(8)  # entries that lie in one thread, one after another


@triton.jit
def _raised(base, WHOLE: tl.constexpr, FRACTION: tl.constexpr, DIGITS: tl.constexpr):
    """As `definition.raised`, in the type of `base`; the power is WHOLE + FRACTION / 2^DIGITS."""
    result = tl.full(base.shape, 1.0, base.dtype)
    square = base
    for digit in tl.static_range(10):
        if (WHOLE >> digit) > 0:
            if (WHOLE >> digit) % 2 == 1:
                result = result * square
            square = square * square
    if DIGITS > 0:
        digits = tl.cast(FRACTION, tl.int64)
        root = base
        for digit in range(DIGITS):
            root = tl.sqrt(root)
            taken = (digits >> (DIGITS - 1 - digit)) & 1
            result = tl.where(taken == 1, result * root, result)
    return result


@triton.jit
def _inverse_unit(peak):
    """1 / unit of `definition.masses`, float64: the exponent of the peak, turned round its middle."""
    largest = peak.to(tl.float32, bitcast=True).to(tl.float64)
    exponent = largest.to(tl.int64, bitcast=True) >> 52
    return ((2045 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _masses(
    score,
    peak,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
):
    """(score / unit)^power in float64, as in `definition.masses`."""
    if UNIT_IS_PEAK:
        base = score.to(tl.float64) / peak.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        base = score.to(tl.float64) * _inverse_unit(peak)
    return _raised(base, WHOLE, FRACTION, DIGITS)


@triton.jit
def _sum(mass, BLOCK: tl.constexpr):
    """A float32 sum with few roundings on any way through it."""
    return tl.sum(tl.sum(tl.reshape(mass, (BLOCK // GROUP, GROUP)), 1), 0)


@triton.jit
def _share_of(total, limbs):
    """⌈amount · total⌉ from the digits of `definition.limbs`, as float64: a long multiplication."""
    upper, lower = total >> BITS, total & LOW_BITS
    carry = total * 0
    rest, next_limb = carry, carry
    for place in tl.static_range(LIMBS):
        limb = tl.load(limbs + (LIMBS - 1 - place)).to(tl.int64)
        column = limb * lower + next_limb * upper + carry
        rest = rest | (column & LOW_BITS)
        carry = column >> BITS
        next_limb = limb
    return next_limb * upper + carry + (rest != 0).to(tl.int64)


@triton.jit
def load_row(
    values,
    weights,
    row,
    width,
    stride,
    HALF: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's scores, and the largest of their bit patterns."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    # To be kept in the cache until it is written; the other policy there also stops the compiler from
    # taking both loads for one, and the row back into registers.
    value = tl.load(
        values + row * stride + column, mask=inside, other=0, eviction_policy="evict_last"
    )
    if value.dtype == tl.int32:
        score = (value & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    elif HALF:
        score = (value & 0x7FFF).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        score = ((value.to(tl.int32) & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    if WEIGHTED:
        score = score * tl.load(weights + column, mask=inside, other=0.0)
    return score, tl.max(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def write_row(
    values,
    onto,
    out,
    zeros,
    row,
    width,
    values_stride,
    onto_stride,
    score,
    least,
    WEIGHTED: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store what reaches `least`, a bit pattern, and how many zeros that leaves. NaN reaches all.

    The row is read again: it is still in the cache, and registers that hold it through the search
    would be missing to other rows.
    """
    column = tl.arange(0, BLOCK)
    inside = column < width
    kept = (score < least.to(tl.float32, bitcast=True)) == 0
    if SAME or WEIGHTED:
        value = tl.load(
            values + row * values_stride + column,
            mask=inside,
            other=0,
            eviction_policy="evict_first",
        )
    written = value if SAME else tl.load(onto + row * onto_stride + column, mask=inside, other=0)
    tl.store(out + row * width + column, tl.where(kept, written, 0).to(written.dtype), mask=inside)
    if WEIGHTED:
        magnitude: tl.constexpr = 0x7FFFFFFF if value.dtype == tl.int32 else 0x7FFF
        alive = kept & ((value & magnitude) != 0)
    elif least.type.is_block():
        alive = kept & (score != 0)
    else:
        # In one comparison: a score that reaches the smallest number there is, is that of no zero.
        alive = (score < tl.maximum(least, 1).to(tl.float32, bitcast=True)) == 0
    tl.store(zeros + row, width - tl.sum(alive.to(tl.int32), 0))


@triton.jit
def search_row(
    score,
    peak,
    numbers,
    width,
    rank,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    DIGITS: tl.constexpr,
    UNIT_IS_PEAK: tl.constexpr,
    MASS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The bit pattern of the row's threshold, and whether it is sure.

    Between `low`, at which the target is held, and `high`, at which it is not: bit patterns without their
    SHIFT empty bits. The mass below a threshold is about a power of it, and bit patterns are about
    logarithms: the next threshold for a share lies on the straight line through the patterns of the last two
    and of the masses below them. For a count (KIND is RANK) it is that of regula falsi (Illinois). After some
    tries every second one halves. With EXACT, or counting, all is sure.
    """
    # A float32 sum passes through at most 7 (a group) + 15 (a thread) + 10 (the trees) roundings of 2^-24,
    # up to 65,536 entries 8 fewer; a mass that is a power through 8, the target through 2.
    plain: tl.constexpr = WHOLE == 1 and DIGITS == 0 and BLOCK <= 65536
    error: tl.constexpr = 2.0**-19 if plain else 2.0**-18
    amount = tl.load(numbers)
    # Sums stay in range, whatever the size of the scores.
    up = peak < 0x2B800000  # 2^-40
    down = peak >= 0x5F800000  # 2^64
    scale = tl.where(up, 2.0**104, tl.where(down, 2.0**-64, 1.0))
    back = tl.where(up, 2.0**-104, tl.where(down, 2.0**64, 1.0))
    if not EXACT:
        # No second copy of the row in registers: rows out of range are searched exactly.
        scale, back = 1.0, 1.0
    mass = score * scale
    mean = _sum(mass, BLOCK) / width
    middle = (mean * tl.load(numbers + 1).to(tl.float32) * back).to(tl.int32, bitcast=True) >> SHIFT
    low = (mean * tl.load(numbers + 2).to(tl.float32) * back).to(tl.int32, bitcast=True) >> SHIFT
    # A mean that overflows says nothing, and its NaN has the bits of a large number.
    low = tl.where(mean < float("inf"), tl.minimum(low, peak >> SHIFT), 0)
    high = (peak >> SHIFT) + 1
    sure = 1
    if KIND == RANK:
        total = width.to(tl.float32)
        target = rank.to(tl.float32)
    else:
        if not EXACT:
            sure = tl.where((up | down) & (peak > 0), 0, 1)
            high = tl.where(sure == 1, high, low)
        if WHOLE > 1 or DIGITS > 0:
            if UNIT_IS_PEAK or DIGITS > 0:
                mass = _masses(score, peak, WHOLE, FRACTION, DIGITS, UNIT_IS_PEAK).to(tl.float32)
            else:
                unit = (_inverse_unit(peak) * tl.cast(back, tl.float64)).to(tl.float32)
                mass = _raised(mass * unit, WHOLE, FRACTION, DIGITS)
        total = _sum(mass, BLOCK)
        target = total * amount.to(tl.float32)
        if EXACT:
            whole = _masses(score, peak, WHOLE, FRACTION, DIGITS, UNIT_IS_PEAK)
            whole = (whole * (2.0**MASS_BITS)).to(tl.int64)
            all_of_it = tl.sum(whole, 0)
            wanted = tl.minimum(tl.maximum(_share_of(all_of_it, numbers + 4), 1), all_of_it)
    if KIND == RANK:
        above = total - target
        below = -target
        side = 0
        step = (1 << 24) >> SHIFT  # two binades
    else:
        floor = total * _LEAST_REST
        wanted_rest = tl.maximum(total - target, floor).to(tl.int32, bitcast=True)
        last, last_rest, guess = 0, 0, middle
        # Patterns of a threshold for one of the rest's: the inverse of the power.
        run = tl.load(numbers + 3).to(tl.float32) / (1 << SHIFT)
    tries = 0
    while high - low > 1:
        if KIND == RANK:
            if tries > 0:
                if low == 0:
                    middle = high - step
                    step = tl.minimum(step * 2, 1 << 29)
                elif (tries > 12) & (tries % 2 == 0):
                    middle = low + (high - low) // 2
                else:
                    spread = above - below
                    ratio = tl.where(spread > 0, above / spread, 0.5)
                    middle = low + ((high - low).to(tl.float32) * ratio).to(tl.int32)
        else:
            halve = (tries >= 8) & (tries % 2 == 0)
            middle = tl.where(halve, low + (high - low) // 2, guess)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reaches = score >= (middle << SHIFT).to(tl.float32, bitcast=True)
        if KIND == RANK:
            count = tl.sum(reaches.to(tl.int32), 0)
            enough = count >= rank
            off = count.to(tl.float32) - target
            # An end that stays twice counts half.
            below = tl.where(enough, tl.where(side == 1, below * 0.5, below), tl.minimum(off, 0.0))
            above = tl.where(enough, tl.maximum(off, 0.0), tl.where(side == -1, above * 0.5, above))
            side = tl.where(enough, 1, -1)
        else:
            # A product adds up in one instruction, a choice in two.
            found = _sum(mass * reaches.to(tl.float32), BLOCK)
            enough = found >= target
            if EXACT:
                enough = tl.sum(tl.where(reaches, whole, 0), 0) >= wanted
            else:
                sure = tl.where(tl.abs(found - target) < error * (found + target), 0, 1)
            rest = tl.maximum(total - found, floor).to(tl.int32, bitcast=True)
            between = (middle - last).to(tl.float32) / (rest - last_rest).to(tl.float32)
            usable = (tries > 0) & (between > 0) & (between < _LARGEST_RUN / (1 << SHIFT))
            run = tl.where(usable, between, run)
            leap = tl.floor((wanted_rest - rest).to(tl.float32) * run + 0.5)
            guess = middle + tl.minimum(tl.maximum(leap, -(2.0**29)), 2.0**29).to(tl.int32)
            last, last_rest = middle, rest
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        tries += 1
        if SHIFT == 0:
            # Between two patterns that occur there is nothing to search.
            key = score.to(tl.int32, bitcast=True)
            low = tl.min(tl.where(key >= low, key, high), 0)
            high = tl.max(tl.where(key < high, key, low), 0) + 1
        high = tl.where(sure == 1, high, low)
    return low << SHIFT, sure
