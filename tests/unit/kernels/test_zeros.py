"""The kernel that counts the zeros of several tensors, in Triton's interpreter, beside the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.kernels import cuda_zeros
from sparsity_atlas.kernels.definition import Threshold

EVERYTHING = Threshold("fixed", constants=torch.zeros(1))


def drawn(width: int, dtype: torch.dtype) -> Tensor:
    """Three rows: zeros of both signs and denormals, an infinity, NaN."""
    values = torch.randn(3, width, generator=torch.manual_seed(width)).round().to(dtype)
    values[0, :: max(1, width // 3)] = -0.0
    values[0, -1] = torch.finfo(dtype).smallest_normal / 2
    values[1, width // 2] = -torch.inf
    values[2, 0] = torch.nan
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_as_the_definition(dtype: torch.dtype) -> None:
    block = drawn(4200, dtype)
    # Aligned and not, a column apart in memory, half of a wider tensor, one that is transposed.
    tensors = [drawn(64, dtype), drawn(7, dtype), block, block[:, 2048:], block[:, 1:90:2]]
    tensors.append(drawn(3, dtype).T)
    places = [5, 0, 3, 1, 6, 2]
    for some in (tensors[:1], tensors[2:4], tensors):
        zeros = torch.full((7, 3), -1, dtype=torch.int32)
        finite = torch.zeros(7, 3, dtype=torch.bool)
        at = places[: len(some)]
        cuda_zeros.count(some, at, zeros, finite)
        for one, place in zip(some, at, strict=True):
            wanted = kernels.reference(EVERYTHING, one, one)
            assert zeros[place].tolist() == wanted.zeros.tolist()
            assert finite[place].tolist() == wanted.finite.tolist()
        rest = sorted(set(range(7)) - set(at))
        assert (zeros[rest] == -1).all()
