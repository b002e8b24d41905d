"""The products of one step of decoding on a CPU, compiled with Numba; `cpu_products` shares them out.

All compiled functions stand in this one file: Numba keeps what it compiled for as long as the file of the
outermost function is the same, and would not see an edit of another one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# Columns that are summed up at a time: long pieces of rows are read faster, and their float32 sums still stay
# in the second cache.
_BLOCK = 16384
# Rows that are summed up by themselves: roundings add up along a sum, and two short ones have fewer.
_RUN = 256
# Products and sums may be one instruction, and a sum may have any order: the same one each time.
_summing = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)


def _read(typing, bits):
    """The float32 that begins with the 16 bits of a bfloat16, or is given as it is."""

    def widen(context, builder, signature, arguments):
        if isinstance(bits, types.Float):
            return arguments[0]
        wide = builder.zext(arguments[0], context.get_value_type(types.int32))
        wide = builder.shl(wide, context.get_constant(types.int32, 16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(bits), widen


# In compiled code a function of one number.
_number: Any = intrinsic(_read)


@_summing
def sum_rows(values, places, weight, sums, first, last):
    """Add x_k · row k of a weight [K, N] for each k of `places`, in columns [first, last).

    Args:
        values: float32 [tokens, K], zero where a token drops what another keeps.
        places: int64, the rows that any token keeps, ascending.
        weight: float32, or the bits of bfloat16.
        sums: float32 [tokens, N], which is written.
        first: column.
        last: column.
    """
    tokens = values.shape[0]
    part = np.empty(_BLOCK, dtype=np.float32)
    for start in range(first, last, _BLOCK):
        end = min(start + _BLOCK, last)
        sums[:, start:end] = 0
        for token in range(tokens):
            total = sums[token, start:end]
            for begin in range(0, len(places), _RUN):
                run = places[begin : begin + _RUN]
                _add_rows(values[token], run, weight, part, start, end)
                for j in range(end - start):
                    total[j] += part[j]


@_summing
def _add_rows(x, places, weight, total, start, end):
    """Write the sum of x_k · row k for each k of `places`, in columns [start, end)."""
    total[:] = 0
    count, width = len(places), end - start
    done = 0
    # Eight rows at a time: a sum is fetched and put back once for all of them.
    while done + 8 <= count:
        a, b, c, d = places[done], places[done + 1], places[done + 2], places[done + 3]
        e, f, g, h = places[done + 4], places[done + 5], places[done + 6], places[done + 7]
        one, two = weight[a, start:end], weight[b, start:end]
        three, four = weight[c, start:end], weight[d, start:end]
        five, six = weight[e, start:end], weight[f, start:end]
        seven, eight = weight[g, start:end], weight[h, start:end]
        xa, xb, xc, xd, xe, xf, xg, xh = x[a], x[b], x[c], x[d], x[e], x[f], x[g], x[h]
        for j in range(width):
            total[j] += (
                xa * _number(one[j])
                + xb * _number(two[j])
                + xc * _number(three[j])
                + xd * _number(four[j])
                + xe * _number(five[j])
                + xf * _number(six[j])
                + xg * _number(seven[j])
                + xh * _number(eight[j])
            )
        done += 8
    for rest in range(done, count):
        row = weight[places[rest], start:end]
        xr = x[places[rest]]
        for j in range(width):
            total[j] += xr * _number(row[j])


@_summing
def dot_rows(values, wanted, weight, out, first, last):
    """x · row n of a weight [N, K] for rows [first, last) that are wanted; zero for the others.

    Args:
        values: float32 [tokens, K].
        wanted: bool [N].
        weight: float32, or the bits of bfloat16.
        out: float32 [tokens, N], which is written.
        first: row.
        last: row.
    """
    for n in range(first, last):
        if not wanted[n]:
            out[:, n] = 0
            continue
        row = weight[n]
        for token in range(values.shape[0]):
            x = values[token]
            total = np.float32(0)
            for k in range(len(row)):
                total += x[k] * _number(row[k])
            out[token, n] = total
