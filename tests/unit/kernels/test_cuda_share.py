"""The kernel in CUDA C++ against the definition, bit for bit: its threads take turns on a CPU."""

from __future__ import annotations

import ctypes
import functools
import shlex
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from test_kernels import LARGEST, SHAPES, drawn, same
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import cuda, cuda_share, nvrtc
from sparsity_atlas.kernels.definition import Threshold, mass_bits

DEVICE = Path(__file__).parents[2] / "emulated_share.c"
SOURCE = resources.files("sparsity_atlas.kernels").joinpath(cuda_share.FILES[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """A kernel for the CPU by what is defined."""
    folder = tmp_path_factory.mktemp("share")
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]

    @functools.cache
    def make(defined: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        path = folder / f"{len(list(folder.iterdir()))}.so"
        options = (f"-D{name}={value}" for name, value in defined)
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", path, DEVICE, "-lm"]
        subprocess.run([*command, *options, f'-DSOURCE="{SOURCE}"'], check=True)
        return ctypes.CDLL(str(path))

    return make


@pytest.fixture
def launched(
    compiled: Callable[..., ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, int]]:
    """The device, and what was launched on it."""
    seen: list[dict[str, int]] = []

    def launch(
        defined: dict[str, int], rows: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        seen.append(defined)
        pointers = (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))
        integers = (ctypes.c_int * len(numbers))(*numbers)
        compiled(tuple(defined.items())).launch(pointers, integers, rows)

    monkeypatch.setattr(cuda_share, "launch", launch)
    monkeypatch.setattr(nvrtc, "is_there", lambda device: True)
    return seen


def rows_of(width: int, dtype: torch.dtype) -> Tensor:
    """Two rows of every kind, one of zeros, one broken each way."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.cat([drawn(shape, width, generator)[:2] for shape in SHAPES])
    broken = torch.cat([0 * rows[:1], rows[:3]])
    broken[1, 3], broken[2, width - 1] = torch.nan, -torch.inf
    largest = LARGEST[dtype]
    return torch.cat([rows.clamp(-largest, largest), broken]).to(dtype)


# A warp, and several of which the last is not full; wide enough that a search finds what is near. Rows of the
# odd ones begin anywhere within what a thread reads at once.
@pytest.mark.parametrize("width", [264, 261, 2056, 2049])
@pytest.mark.parametrize("dtype", list(cuda_share.TYPES))
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_definition(
    launched: list[dict[str, int]], width: int, dtype: torch.dtype, weighted: bool
) -> None:
    values = rows_of(width, dtype)
    weights = torch.linspace(0, 2, width).roll(width // 3) if weighted else None
    for amount, onto in ((0.9, values), (0.5, values.flip(0)), (0.0, values)):
        rule = Threshold("share", amount, weights=weights)
        same(cuda.masked(rule, values, onto), kernels.reference(rule, values, onto))
    assert len(launched) == 3
    assert {one["MASS_BITS"] for one in launched} == {mass_bits(width)}


def test_rows_that_lie_apart(launched: list[dict[str, int]]) -> None:
    wide = rows_of(528, torch.bfloat16)
    values = wide[:, :264]
    rule = Threshold("share", 0.9)
    same(cuda.masked(rule, values, values), kernels.reference(rule, values, values))
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", list(cuda_share.TYPES))
@pytest.mark.parametrize("amount", [0.9, 0.0])
def test_an_odd_row_writes_nothing_beside_itself(
    launched: list[dict[str, int]], dtype: torch.dtype, amount: float
) -> None:
    """Another block may have written what lies there."""
    width, rule = 261, Threshold("share", amount)
    values = rows_of(width, dtype)
    cut = cuda_share.cut_of(rule, width, dtype)
    assert cut is not None
    numbers = cuda.numbers_of(rule, width, values.device)
    for rows in range(1, 10):
        out = torch.full((rows + 1, width), 7.0, dtype=dtype)
        zeros = torch.empty(rows, dtype=torch.int32)
        some = values[:rows]
        cuda_share.masked(some, some, out, zeros, zeros.bool(), None, numbers, cut)
        assert torch.equal(out[rows], torch.full((width,), 7.0, dtype=dtype))
        assert torch.equal(out[:rows], kernels.reference(rule, some, some).out)
    assert all(one["RAGGED"] for one in launched)


def test_what_it_is_not_made_for(launched: list[dict[str, int]]) -> None:
    """Odd rows with gaps, odd places, narrow rows and other rules go the other way, and so do few rows."""
    values = drawn("normal", 272, torch.Generator().manual_seed(1)).repeat(5, 1).to(torch.bfloat16)
    for width, rule, first in (
        (265, Threshold("share", 0.9), 0),
        (264, Threshold("share", 0.9), 1),
        (128, Threshold("share", 0.9), 0),
        (264, Threshold("share", 0.9, 2.0), 0),
        (264, Threshold("share", 1.0), 0),
        (264, Threshold("rank", 9), 0),
    ):
        rows = values[:, first : first + width]
        assert cuda._share(rule, rows, rows) is None
        assert cuda._share(rule, rows, values[:, :width]) is None
    rows = values[:2, :264]
    few = Threshold("share", 0.9)
    same(cuda.masked(few, rows, rows), kernels.reference(few, rows, rows))
    assert not launched


def test_cuts_have_a_place_for_each_entry() -> None:
    """Of all widths up to what threads can take."""
    for dtype in cuda_share.TYPES:
        for weights in (None, torch.ones(1)):
            rule = Threshold("share", 0.9, weights=weights)
            for width in range(256, 40000, 248):
                cut = cuda_share.cut_of(rule, width, dtype)
                if cut is None:
                    continue
                places = cut.threads * cut.vectors * cuda_share.READ // dtype.itemsize
                assert width <= places
                assert cut.threads % 32 == 0
                assert cut.threads <= 1024
            assert cuda_share.cut_of(rule, 28672, dtype) is not None
