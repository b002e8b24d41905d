"""Every kernel against the definition, bit for bit."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.kernels import cpu, cpu_row, cuda
from sparsity_atlas.kernels.definition import (
    Threshold,
    limbs,
    masses,
    not_above,
    raised,
    rounded_up,
)

# NaN and infinities are what some tests are about; on a GPU nobody warns of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in reduce:RuntimeWarning"),
]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}


def drawn(shape: str, width: int, generator: torch.Generator) -> Tensor:
    """Four rows of one kind, float64."""
    normal = torch.randn(4, width, generator=generator, dtype=torch.float64)
    match shape:
        case "normal":
            return normal
        case "heavy":
            return normal * torch.exp(3 * torch.randn(width, generator=generator))
        case "all exponents":
            return normal * 2.0 ** torch.randint(-149, 127, (4, width), generator=generator)
        case "tied":
            return (2 * normal).round()
        case "relu":
            return normal.clamp(min=0)
        case "constant":
            return normal[:, :1].repeat(1, width)
        case "denormal":
            return (4 * normal).round() * 2.0**-149
        case "huge":
            return normal * 1e38
        case "one":
            return normal * (torch.arange(width) == width // 2)
    raise AssertionError(shape)


SHAPES = ("normal", "heavy", "all exponents", "tied", "relu", "constant", "denormal", "huge", "one")


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[rows, width] of every kind and type; a row of zeros is among them."""
    width = draw(st.one_of(st.integers(1, 40), st.sampled_from((64, 127, 896, 1001, 2048))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(TYPES))
    values = drawn(draw(st.sampled_from(SHAPES)), width, generator)
    values[draw(st.integers(0, 1))] *= draw(st.sampled_from((0.0, 1.0, -1.0)))
    return values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


LEVEL = st.one_of(
    st.sampled_from((0.0, 1e-30, 0.5, 0.9, 0.9999, 1 - 2**-53, 1.0)), st.floats(0, 1, width=32)
)


@st.composite
def rules(draw: st.DrawFn, width: int) -> Threshold:
    """Any rule for rows of this width."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights = draw(st.sampled_from((None, 0.0, 1.0, 1e3)))
    if weights is not None:
        weights *= torch.rand(width, generator=generator)
    kind = draw(st.sampled_from(("share", "rank", "peak", "fixed")))
    match kind:
        case "share":
            power = draw(st.sampled_from((1.0, 1.0, 2.0, 3.0, 1.5, 1.3, 8.25, 40.0)))
            return Threshold(kind, draw(LEVEL), power, weights)
        case "rank":
            return Threshold(kind, draw(st.integers(0, width)), weights=weights)
        case "peak":
            return Threshold(kind, draw(LEVEL), weights=weights)
    count = draw(st.sampled_from((1, width)))
    constants = torch.rand(count, generator=generator) * draw(st.sampled_from((0.0, 1.0, 1e3)))
    constants[0] = draw(st.sampled_from((0.0, 1.0, torch.inf)))
    return Threshold(kind, weights=weights, constants=constants)


def same(found: tuple, wanted: kernels.Masked) -> None:
    integer = torch.int32 if wanted.out.element_size() == 4 else torch.int16
    assert torch.equal(found[0].view(integer), wanted.out.view(integer))
    assert found[1].tolist() == wanted.zeros.tolist()
    assert found[2].tolist() == wanted.finite.tolist()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cpu_kernel_is_the_definition(data: st.DataObject) -> None:
    agrees(cpu.masked, data)


# Interpreted, a row takes a tenth of a second.
@settings(max_examples=40, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(st.data())
def test_cuda_kernel_is_the_definition(data: st.DataObject) -> None:
    agrees(cuda.masked, data, rows=2)


def agrees(masked: Callable, data: st.DataObject, rows: int = 4) -> None:
    values = data.draw(matrices())[:rows]
    rule = data.draw(rules(values.shape[1]))
    onto = values if data.draw(st.booleans()) else values.flip(-1)
    same(masked(rule, values, onto), kernels.reference(rule, values, onto))


KERNELS = pytest.mark.parametrize("masked", [cpu.masked, cuda.masked], ids=["cpu", "cuda"])
RULES = (
    Threshold("share", 0.9),
    Threshold("share", 0.9, 2.0),
    Threshold("rank", 3),
    Threshold("peak", 0.5),
    Threshold("fixed", constants=torch.tensor([1.0])),
    Threshold("fixed", constants=torch.arange(9.0)),
)


@KERNELS
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_broken_rows_are_kept_whole_and_told(
    masked: Callable, dtype: torch.dtype, bad: float, rule: Threshold
) -> None:
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[1, 4] = bad
    found = masked(rule, values, values)
    same(found, kernels.reference(rule, values, values))
    assert found[2].tolist() == [True, False, True]
    assert torch.equal(found[0][1].nan_to_num(7), values[1].nan_to_num(7))


@KERNELS
def test_scores_that_overflow_are_told(masked: Callable) -> None:
    values = torch.tensor([[1.0, 3e38], [1.0, 2.0]])
    rule = Threshold("share", 0.5, weights=torch.tensor([1.0, 10.0]))
    found = masked(rule, values, values)
    same(found, kernels.reference(rule, values, values))
    assert found[2].tolist() == [False, True]


@KERNELS
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_kept_keeps_every_bit(masked: Callable, dtype: torch.dtype) -> None:
    values = torch.tensor([[3.0, -2.0, 1.0, 0.5]]).to(dtype)
    onto = torch.tensor([[-0.0, torch.nan, 5.0, 6.0]]).to(dtype)
    out, zeros, finite = masked(Threshold("rank", 2), values, onto)[:3]
    assert out[0, 1].isnan()
    assert out[0, 0] == 0
    assert out[0, 0].signbit()
    assert out[0, 2:].tolist() == [0, 0]
    assert not out[0, 2:].signbit().any()
    assert (zeros.tolist(), finite.tolist()) == ([2], [True])


@KERNELS
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_are_not_contiguous(masked: Callable, dtype: torch.dtype) -> None:
    wide = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    left, right = wide.chunk(2, dim=-1)
    rule = Threshold("share", 0.7)
    same(masked(rule, left, right), kernels.reference(rule, left, right))
    same(masked(rule, left, left.flip(0)), kernels.reference(rule, left, left.flip(0)))
    turned = wide.T[:4]
    same(masked(rule, turned, turned), kernels.reference(rule, turned, turned))


@KERNELS
def test_no_rows(masked: Callable) -> None:
    empty = torch.empty(0, 8)
    out, zeros, finite = masked(Threshold("share", 0.9), empty, empty)[:3]
    assert (out.shape, zeros.shape, finite.shape) == ((0, 8), (0,), (0,))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", RULES[:4], ids=lambda rule: rule.kind)
def test_threads_change_nothing(rule: Threshold, dtype: torch.dtype, one_thread: None) -> None:
    values = torch.randn(301, 701, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = cpu.masked(rule, values, values)
    torch.set_num_threads(3)
    same(cpu.masked(rule, values, values), kernels.Masked(*alone))


# A comparison within the sums' error: two entries that hold a share exactly, beside many small ones.


@KERNELS
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_target_that_is_met_exactly(masked: Callable, dtype: torch.dtype, shift: int) -> None:
    # 512 + 256 + 256 ones make 1024: the level is 3/4 of it, or a last bit off.
    values = torch.tensor([[512.0, 256.0, *[1.0] * 256]]).to(dtype)
    level = 0.75 + shift * 2.0**-53
    found = masked(Threshold("share", level), values, values)
    assert found[1].tolist() == [0 if shift == 1 else 256]


# The decimal that was written, by exact rational arithmetic

DECIMALS = [0.01, 0.05, 0.1, 0.29, 0.3, 0.55, 0.57, 0.58, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995]


@st.composite
def whole_numbers(draw: st.DrawFn) -> Tensor:
    """Rows of whole numbers, which every type holds, with sums that decimals divide."""
    width = draw(st.integers(1, 12))
    row = st.lists(st.integers(0, 128), min_size=width, max_size=width)
    values = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float64)
    # One more entry makes the sum a multiple of 100, as far as the type holds it.
    values = torch.cat([values, (-values.sum(-1, keepdim=True)) % 100], -1)
    dtype = draw(st.sampled_from(TYPES))
    return (values * 2.0 ** draw(st.sampled_from((-10, 0, 8)))).to(dtype)


def exactly(kind: str, row: list[float], level: Fraction, power: int) -> int:
    """How many entries a share of the mass, or of the peak, keeps."""
    scores = [Fraction(value) ** power for value in sorted(row, reverse=True)]
    if kind == "peak":
        return sum(score >= level * scores[0] for score in scores)
    running, least = Fraction(0), scores[0]
    for least in scores:
        running += least
        if running >= level * sum(scores):
            break
    return sum(score >= least for score in scores)


def keeps_the_decimal(
    masked: Callable, values: Tensor, level: float, kind: str, power: int
) -> None:
    out = masked(Threshold(kind, level, power), values, torch.ones_like(values))[0]
    for row, kept in zip(values.double().tolist(), out.sum(-1).tolist(), strict=True):
        assert kept == exactly(kind, row, Fraction(str(level)), power)


PATHS = [kernels.reference, cpu.masked, cuda.masked]


@pytest.mark.parametrize("masked", PATHS[:2], ids=["reference", "cpu"])
@settings(max_examples=150, deadline=None)
@given(
    whole_numbers(), st.integers(1, 999), st.sampled_from([("share", 1), ("share", 2), ("peak", 1)])
)
def test_a_level_is_its_decimal(
    masked: Callable, values: Tensor, thousandths: int, rule: tuple[str, int]
) -> None:
    keeps_the_decimal(masked, values, thousandths / 1000, *rule)


@pytest.mark.parametrize("masked", PATHS, ids=["reference", "cpu", "cuda"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["share", "peak"])
def test_what_a_decimal_divides(masked: Callable, dtype: torch.dtype, kind: str) -> None:
    """A hundredth of 100 after the other: of 0.55 · 100 float64 makes 55.00000000000001."""
    for percent in range(50, 100) if masked is not cuda.masked else (55, 56, 57, 58, 69):
        other = 100.0 if kind == "peak" else 100.0 - percent
        values = torch.tensor([[percent, other]], dtype=dtype)
        keeps_the_decimal(masked, values, percent / 100, kind, 1)
        # The same among others that a sum in float32 cannot tell it from.
        if dtype == torch.float32 and kind == "share":
            small = [2.0**-14] * 4
            row = [float(percent) - 2.0**-13, *small, 100 - percent - 2.0**-13]
            keeps_the_decimal(masked, torch.tensor([row]), percent / 100, kind, 1)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2**62 - 1),
    st.one_of(
        *(st.sampled_from(DECIMALS), st.floats(0, 1, exclude_max=True)),
        *(st.integers(0, 10**16 - 1).map(lambda number: number / 10**16),),
    ),
)
def test_a_share_of_a_whole_number(total: int, amount: float) -> None:
    wanted = math.ceil(Fraction(repr(amount)) * total)
    found = cpu_row._share_of(np.int64(total), np.array(limbs(amount), dtype=np.int64))
    # Below 1 a row's target is 1 whatever the share is.
    assert max(int(found), 1) == max(wanted, 1)


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-126, 2.0**127, width=32), st.integers(0, 8), st.data())
def test_a_share_of_the_peak(peak: float, places: int, data: st.DataObject) -> None:
    """The threshold is the least float32 that a decimal of the peak does not exceed."""
    level = data.draw(st.integers(0, 10**places)) / 10**places
    least = rounded_up(torch.tensor([peak], dtype=torch.float64) * not_above(level))
    exact = Fraction(str(level)) * Fraction(peak)
    assert Fraction(float(least)) >= exact
    if level > 0:
        assert Fraction(float(torch.nextafter(least, torch.zeros(1)))) < exact


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2.0**127, width=32), st.decimals(0, 1000, places=6))
def test_no_float32_lies_between_a_decimal_and_its_float64(value: float, level: Decimal) -> None:
    """What a constant threshold rests on: the level's own float64 decides as its decimal does."""
    for near in (value, float(torch.tensor(float(level)))):
        assert (near >= float(level)) == (Fraction(near) >= Fraction(level))


# The definition


def test_masses_are_exact_where_they_can_be() -> None:
    score = torch.tensor([[3.0, 2.0**-20, 1.0, 0.0]])
    bits = 62 - 3
    assert masses(score, 1.0).tolist() == [[3 << (bits - 2), 1 << (bits - 22), 1 << (bits - 2), 0]]
    assert masses(score, 2.0).tolist() == [[9 << (bits - 4), 1 << (bits - 44), 1 << (bits - 4), 0]]


@pytest.mark.parametrize("power", [1, 1.5, 2, 2.75, 3, 7, 1.3, 8.1, 100])
def test_powers(power: float) -> None:
    base = torch.tensor([0.0, 1e-3, 0.3, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(raised(base, power), base**power, rtol=1e-13, atol=0)


def test_powers_are_the_same_everywhere() -> None:
    """Of IEEE's multiplications and square roots: where a library's root is another one, masks differ."""
    base = torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [x * math.sqrt(x) * math.sqrt(math.sqrt(x)) for x in base.tolist()]
    assert raised(base, 1.75).tolist() == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "fixed"}, "constants: they belong to `fixed` alone, found kind 'fixed'"),
        ({"kind": "rank", "constants": torch.ones(1)}, "found kind 'rank'"),
        ({"kind": "share", "weights": torch.ones(2, 2)}, r"weights: expected float32 of one dim"),
        ({"kind": "share", "weights": torch.ones(2).double()}, r"found torch\.float64 \[2\]"),
        ({"kind": "share", "weights": -torch.ones(2)}, "weights: expected numbers that are not"),
        ({"kind": "share", "weights": torch.tensor([torch.inf])}, "weights: expected numbers"),
        ({"kind": "fixed", "constants": torch.tensor([torch.nan])}, "constants: expected numbers"),
    ],
)
def test_a_rule_that_makes_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Threshold(**arguments)


# Which path is taken


@pytest.fixture
def chosen(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Masks twice, and tells what was logged of the path."""
    caplog.set_level(logging.INFO, "sparsity_atlas")
    kernels._path.cache_clear()
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def run() -> list[str]:
        for _ in range(2):
            found = kernels.masked(Threshold("share", 0.5), values, values)
            assert (found.out.shape, found.zeros.shape) == ((2, 3, 8), (2, 3))
            expected = kernels.reference(Threshold("share", 0.5), values[0], values[0])
            assert torch.equal(found.out[0], expected.out)
        return caplog.messages

    yield run
    kernels._path.cache_clear()


def test_the_compiled_path_is_taken_where_there_is_one(chosen: Callable) -> None:
    assert chosen() == ["kernels: compiled (numba)"]


def test_the_reference_can_be_forced(chosen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    monkeypatch.setattr(cpu, "masked", None)
    assert chosen() == ["kernels: reference (forced)"]


def test_without_the_library(chosen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: str) -> None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(kernels, "_compiled", missing)
    assert chosen() == ["kernels: reference (numba is not installed)"]
    monkeypatch.setenv(kernels.VARIABLE, "compiled")
    with pytest.raises(AtlasError, match=r"compiled: no kernel \(numba is not installed\)"):
        chosen()


def test_an_import_that_fails_otherwise_is_not_hidden(
    chosen: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(device: str) -> None:
        raise ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite")

    monkeypatch.setattr(kernels, "_compiled", missing)
    with pytest.raises(ModuleNotFoundError, match="llvmlite"):
        chosen()


def test_an_unknown_choice(chosen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(AtlasError, match=r"KERNELS: expected one of auto, .*, found 'fast'"):
        chosen()


def test_very_wide_rows_take_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsity_atlas")
    kernels._path.cache_clear()
    values = torch.ones(1, kernels.LARGEST_WIDTH + 1)
    assert kernels.masked(Threshold("share", 0.5), values, values).zeros.tolist() == [0]
    assert caplog.messages == ["kernels: reference (none for rows of more than 131,072 entries)"]
    kernels._path.cache_clear()


@pytest.mark.parametrize("many", [False, True])
def test_a_row_of_any_width_fits_a_processor(many: bool) -> None:
    """65,536 registers are there for a row, 255 for a thread, 1,024 threads."""
    for block in (2**exponent for exponent in range(3, 18)):
        warps, registers = cuda.launch(block, many=many)
        assert 1 <= warps <= 32
        assert 32 <= registers <= 255
        assert 32 * warps * registers <= 65536


def test_the_cuda_kernels_compile(request: pytest.FixtureRequest) -> None:
    """The interpreter takes what the compiler refuses; neither needs a GPU."""
    # Kept between runs: Triton finds there what it compiled of the same source, options and version.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(request.config.cache.mkdir("triton"))}
    del environment["TRITON_INTERPRET"]
    script = Path(__file__).parents[2] / "compile_cuda.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plans_last_as_long_as_their_rules() -> None:
    """A recorded step reads its plans' tensors: those of 144 places, and others come after them."""
    asked = 4, torch.float32, torch.device("cpu"), True, True, False
    rule = Threshold("share", 0.9, weights=torch.ones(4))
    numbers = weakref.ref(cuda._plan(rule, *asked).tensors[2])
    for _ in range(300):
        cuda._plan(Threshold("share", 0.9, weights=torch.ones(4)), *asked)
    assert numbers() is not None
    del rule
    gc.collect()
    assert numbers() is None
