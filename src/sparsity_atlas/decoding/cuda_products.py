"""The products of `maps` on CUDA: what is launched, and how it is cut into programs."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sparsity_atlas.decoding import cluster_products, cuda_inputs, cuda_outputs, row_products
from sparsity_atlas.decoding.cuda_entries import ACTIVATIONS
from sparsity_atlas.decoding.cuda_sources import READ, processors
from sparsity_atlas.decoding.vector import Keep

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.decoding.vector import Norm, Vector

# Bytes that a warp loads at once of a row: 16 of each thread.
_WARP_BYTES = 512
# Tokens of several rows are padded to what the matrix units take.
_TOKENS = 16


_UNITS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Cut(NamedTuple):
    """How a product by inputs is cut into programs.

    Attributes:
        rows: of the transposed weight that a program asks for at once.
        columns: that a program makes.
        split: programs that share these columns.
        warps: of a program.
        listed: whether a program lists the rows that it needs first.
        units: whether the matrix units multiply, as they do for several tokens anyway.
        stages: tiles that are asked for ahead, with `units`.
    """

    rows: int
    columns: int
    split: int
    warps: int
    listed: bool
    units: bool = False
    stages: int = 1


# By inputs, outputs, and whether two maps are made together: what was best on an H200 for one token of
# bfloat16 over sparsities of 5 to 89 %, as `benchmarks/decoding_tune.py` finds it; Llama 3.2 1B, 3.1 8B, 70B.
CUTS: dict[tuple[int, int, bool], Cut] = {
    (2048, 8192, False): Cut(16, 1024, 33, 4, True),
    (8192, 2048, False): Cut(32, 512, 66, 4, True),
    (2048, 8192, True): Cut(16, 512, 16, 4, True),
    (4096, 14336, False): Cut(16, 1024, 38, 4, True),
    (14336, 4096, False): Cut(32, 1024, 66, 8, True),
    (4096, 14336, True): Cut(32, 256, 5, 4, True, units=True, stages=3),
    (8192, 28672, False): Cut(16, 1024, 19, 4, True),
    (28672, 8192, False): Cut(32, 1024, 66, 8, True),
    (8192, 28672, True): Cut(16, 512, 9, 4, True),
}


class OutputCut(NamedTuple):
    """How a product by outputs is cut into programs.

    Attributes:
        rows: of the weight that a program makes entries of.
        columns: that it asks for at once.
        warps: of a program.
    """

    rows: int
    columns: int
    warps: int


def by_inputs(
    vector: Vector,
    weight: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cut: Cut | None = None,
) -> Tensor:
    """W (x ⊙ m), or u ⊙ σ(g) of two maps, reading the rows of the transposed weights that x meets.

    Args:
        vector: x [tokens, K] and its mask.
        weight: Wᵀ, or W_uᵀ, [K, N], contiguous.
        second: W_gᵀ, of the same shape; with an activation.
        bias: [N]; without an activation.
        activation: one of `ACTIVATIONS`.
        cut: into programs; None: what was best on an H200.

    Returns:
        [tokens, N], of the type of x.
    """
    x = vector.values
    (tokens, inputs), outputs = x.shape, weight.shape[1]
    if cut is None and tokens == 1:
        gated = second is not None
        plan = _plan(vector, outputs, gated)
        if plan is not None:
            if not cluster_products.finds(vector, plan):
                vector = vector.found()
            return cluster_products.by_inputs(vector, weight, second, bias, activation, plan=plan)
    vector = vector.found()
    x = vector.values.contiguous()
    if cut is None:
        cut = _cut(inputs, outputs, x.element_size(), second is not None, tokens > 1, x.device)
    lines = 1 if tokens == 1 else _TOKENS
    per = triton.cdiv(triton.cdiv(inputs, cut.split), cut.rows) * cut.rows
    tiles = triton.cdiv(outputs, cut.columns)
    room = room_of(x.device)
    floats = cut.split * lines * outputs * (1 if second is None else 2)
    reach = triton.next_power_of_2(per)
    partial, arrived, lists = room.of(floats, tiles, tiles * cut.split * reach if cut.listed else 1)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    with on(x.device):
        cuda_inputs.by_inputs[(tiles, cut.split)](
            *(x, weight, weight if second is None else second, weight if bias is None else bias),
            *(out, partial, arrived, lists, x if vector.constants is None else vector.constants),
            *(inputs, outputs, tokens, cut.split),
            KEEP=int(vector.keep),
            BY_CHANNEL=vector.by_channel,
            BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation] if activation else 0,
            LINES=lines,
            UNITS=cut.units or tokens > 1,
            ALONE=cut.split == 1,
            BK=cut.rows,
            BN=cut.columns,
            LANES=min(max(1, cut.warps * _WARP_BYTES // x.element_size() // cut.columns), cut.rows),
            PER=reach if cut.listed else 1,
            LISTED=cut.listed,
            UNIT=_unit(x),
            CHAINED=chained(x.device),
            STAGES=cut.stages,
            num_warps=cut.warps,
            launch_pdl=chained(x.device),
        )
    return out


def after_norm(
    vector: Vector,
    norm: Norm,
    weight: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """As `by_inputs`, of the norm of a sum, both of which it makes on the way.

    Args:
        vector: x [1, K], and the mask of its norm.
        norm: what is added to x, and by what is multiplied.
        weight: as there.
        second: likewise.
        bias: likewise.
        activation: likewise.

    Returns:
        The sum [1, K], and what is made [1, N]; None where no kernel does that.
    """
    x = vector.values
    (tokens, inputs), outputs = x.shape, weight.shape[1]
    size = x.element_size()
    given = [x, norm.weight] if norm.more is None else [x, norm.weight, norm.more]
    whole = all(
        one.dtype == x.dtype and one.is_contiguous() and one.data_ptr() % READ == 0 for one in given
    )
    if tokens != 1 or not whole or inputs * size % READ:
        return None
    plan = _plan(vector, outputs, second is not None)
    if plan is None or not cluster_products.finds(vector, plan):
        return None
    total = torch.empty_like(x)
    made = cluster_products.by_inputs(
        vector, weight, second, bias, activation, plan=plan, norm=norm, total=total
    )
    return total, made


def by_outputs(
    x: Tensor,
    weight: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    factor: Tensor | None = None,
    decides: str | None = None,
    rule: Vector | None = None,
    cut: OutputCut | None = None,
) -> Tensor:
    """Entries of W x from rows of W as it lies, and of these only the ones that are wanted.

    Args:
        x: [tokens, K].
        weight: W [N, K]; of two maps W_u, or where one decides that one's.
        second: the other map's, with an activation.
        bias: [N], without an activation.
        activation: as above.
        factor: [tokens, N], the other factor; entries where it is zero are not made, and the product of
            both is
            returned.
        decides: `gate` or `up`, whose entries, g after the nonlinearity, decide which rows of `second` are
            read.
        rule: how they decide: a mask without values.
        cut: into programs.

    Returns:
        [tokens, N], of the type of x.
    """
    x = x.contiguous()
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    if activation and second is not None and cut is None:
        rows = row_products.rows_of(x, weight, second, decides=decides is not None)
        if rows is not None:
            return row_products.factors(
                x, weight, second, activation, decides=decides, rule=rule, rows=rows
            )
    cut = cut or _output_cut(inputs, x.element_size(), tokens > 1)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    keep = 1 if factor is not None else 0 if rule is None else int(rule.keep)
    constants = None if rule is None else rule.constants
    with on(x.device):
        cuda_outputs.by_outputs[(triton.cdiv(outputs, cut.rows),)](
            *(x, weight, weight if second is None else second, weight if bias is None else bias),
            *(x if factor is None else factor.contiguous(), out),
            *(x if constants is None else constants, inputs, outputs, tokens),
            KEEP=keep,
            BY_CHANNEL=rule is not None and rule.by_channel,
            BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation] if activation else 0,
            DECIDES={None: 0, "gate": 1, "up": 2}[decides],
            BATCH=1 if tokens == 1 else _TOKENS,
            BR=cut.rows,
            BK=cut.columns,
            UNIT=_unit(x),
            CHAINED=chained(x.device),
            num_warps=cut.warps,
            launch_pdl=chained(x.device),
        )
    return out


def _plan(vector: Vector, outputs: int, gated: bool) -> cluster_products.Plan | None:
    """How a product of one token is cut into clusters, if it is."""
    x = vector.values
    # A block that finds a threshold looks at the whole vector, so that many small ones look too often.
    expected = 0.0 if vector.keep is Keep.SHARE else vector.expected
    inputs, size = x.shape[1], x.element_size()
    return cluster_products.plan_of(inputs, outputs, size, gated, x.device, expected)


def _cut(
    inputs: int, outputs: int, size: int, gated: bool, batched: bool, device: torch.device
) -> Cut:
    known = CUTS.get((inputs, outputs, gated))
    if known and size == 2 and not batched:
        return known
    if batched:
        columns, rows = _WARP_BYTES // size, 32
        programs = 4 * processors(device)
    else:
        # Four times what a warp loads of a row at once: memory gives long stretches faster.
        columns, rows = 4 * _WARP_BYTES // size, 8 if gated else 16
        programs = 5 * processors(device)
    while columns > 32 and columns >= 2 * outputs:
        columns, rows = columns // 2, 2 * rows
    split = programs // triton.cdiv(outputs, columns)
    # At least one tile of rows each.
    split = max(1, min(split, triton.cdiv(inputs, rows), 64))
    return Cut(rows, columns, split, 4, not batched)


def _output_cut(inputs: int, size: int, batched: bool) -> OutputCut:
    if batched:
        return OutputCut(16, min(256 // size * 2, max(16, triton.next_power_of_2(inputs))), 4)
    return OutputCut(2, min(4096 // size, max(64, triton.next_power_of_2(inputs))), 2)


@functools.cache
def chained(device: torch.device) -> bool:
    """Whether a launch may begin to take its place before the last one has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class _Room:
    """Memory of a device that launches pass their partial sums through; one launch at a time uses it.

    Counters are zero between launches: the last program of a tile puts its own back.
    """

    def __init__(self, device: torch.device) -> None:
        self._partial = torch.empty(0, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)
        self._lists = torch.empty(0, dtype=torch.int32, device=device)
        # Graphs that were captured go on using what was there before.
        self._kept: list[Tensor] = []

    def of(self, floats: int, tiles: int, listed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial sums, counters, and places of lists, at least as many."""
        if self._partial.numel() < floats:
            self._kept.append(self._partial)
            self._partial = self._partial.new_empty(floats)
        if self._arrived.numel() < tiles:
            self._kept.append(self._arrived)
            self._arrived = self._arrived.new_zeros(tiles)
        if self._lists.numel() < listed:
            self._kept.append(self._lists)
            self._lists = self._lists.new_empty(listed)
        return self._partial, self._arrived, self._lists


@functools.cache
def room_of(device: torch.device) -> _Room:
    """The memory that all launches on a device share."""
    return _Room(device)


def _unit(x: Tensor) -> tl.dtype:
    """The type in which the matrix units multiply; Triton's interpreter has no products of bfloat16."""
    return _UNITS[x.dtype] if x.is_cuda else tl.float32


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within: launches are on this device; nothing for Triton's interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
