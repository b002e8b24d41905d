"""Compile the CUDA kernels for Hopper, which needs no GPU. Run in a process of its own: the tests' own
Triton interprets."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsity_atlas.kernels import cuda
from sparsity_atlas.kernels.cuda_row import GROUP
from sparsity_atlas.kernels.definition import Threshold

WIDTH = 1001
RULES = (
    Threshold("share", 0.9),
    Threshold("share", 0.9, 2.5),
    Threshold("share", 0.9, 40.0),
    Threshold("share", 0.9, weights=torch.ones(WIDTH)),
    Threshold("rank", 100),
    Threshold("peak", 0.5),
    Threshold("fixed", constants=torch.tensor([0.1])),
    Threshold("fixed", constants=torch.ones(WIDTH)),
)
POINTERS = {"zeros": "*i32", "finite": "*i8", "weights": "*fp32", "constants": "*fp32"}
POINTERS |= {"numbers": "*fp64"}
NUMBERS = ("width", "values_stride", "onto_stride", "rank")


def compile_kernel(kernel: triton.JITFunction, rule: Threshold, dtype: torch.dtype) -> None:
    """Compile one kernel for one rule and type, down to machine code."""
    block = max(GROUP.value, triton.next_power_of_2(WIDTH))
    constants = {**cuda.variant_of(rule, rule.kind, dtype, WIDTH), "SAME": False, "BLOCK": block}
    bits = "*i32" if dtype == torch.float32 else "*i16"
    types = {**dict.fromkeys(("values", "onto", "out"), bits), **POINTERS}
    types |= dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    warps, registers = cuda.launch(block, many=False)
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps, "maxnreg": registers})


for rule in RULES:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        compile_kernel(cuda._mask, rule, dtype)
