"""Compile the CUDA kernels for Hopper, which needs no GPU. Run in a process of its own: the tests' own
Triton interprets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsity_atlas.decoding import cuda_inputs, cuda_outputs
from sparsity_atlas.kernels import cuda, cuda_masks, cuda_zeros
from sparsity_atlas.kernels.cuda_row import GROUP
from sparsity_atlas.kernels.definition import INFINITIES, Threshold
from sparsity_atlas.kernels.prompts import cuda_sequences
from sparsity_atlas.speed import cuda_step

# More than one warp's, and no power of two; a wider row is more of the same code.
WIDTH = 300
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
POINTERS |= {"numbers": "*fp64", "ranks": "*i32"}
NUMBERS = ("width", "values_stride", "onto_stride")


def compile_kernel(
    kernel: triton.JITFunction, rule: Threshold, dtype: torch.dtype, *, by_row: bool = False
) -> None:
    """Compile one kernel for one rule and type, down to machine code."""
    block = max(GROUP.value, triton.next_power_of_2(WIDTH))
    constants = {
        **cuda.variant_of(rule, rule.kind, dtype, WIDTH),
        "BY_ROW": by_row,
        "SAME": False,
        "BLOCK": block,
        "CHAINED": True,
    }
    bits = "*i32" if dtype == torch.float32 else "*i16"
    types = {**dict.fromkeys(("values", "onto", "out"), bits), **POINTERS}
    types |= dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    warps, registers = cuda.launch(block, many=False)
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    triton.compile(
        source,
        GPUTarget("cuda", 90, 32),
        {"num_warps": warps, "maxnreg": registers, "launch_pdl": True},
    )


def compile_product(kernel: triton.JITFunction, dtype: str, **choices: int | bool) -> None:
    """Compile a product of one step of decoding."""
    units = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    common = {"KEEP": 2, "BY_CHANNEL": False, "BIAS": False, "ACTIVATION": 0}
    # Which is what a launch on Hopper asks for.
    constants = {**common, "UNIT": units[dtype], "CHAINED": True, **choices}
    types = dict.fromkeys(("x", "weight", "second", "bias", "flags", "out"), f"*{dtype}")
    types |= {"partial": "*fp32", "arrived": "*i32", "lists": "*i32", "cuts": "*fp32"}
    types |= dict.fromkeys(("K", "N", "rows", "parts"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    options = {"num_warps": 4, "launch_pdl": True}
    triton.compile(source, GPUTarget("cuda", 90, 32), options)


def compile_masks(dtype: torch.dtype) -> None:
    """Compile the kernels of masks that follow from no threshold."""
    bits = "*i32" if dtype == torch.float32 else "*i16"
    types = dict.fromkeys(("values", "onto", "out"), bits) | {"mask": "*i8", **POINTERS}
    types |= {"codes": "*i64", "limits": "*i64"}
    constants = {"INFINITY": INFINITIES[dtype], "BLOCK": 512, "SIZE": 12, "PLACES": 16}
    constants["GROUPS"] = 32
    largest = cuda_masks._largest if dtype == torch.float32 else cuda_masks._largest_in_pairs
    for kernel in (cuda_masks._apply, largest, cuda_masks._draw):
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        kinds = {name: "i32" for name in kernel.arg_names} | types | dict.fromkeys(own, "constexpr")
        signature = {name: kinds[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=own)
        triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": cuda_masks.WARPS})


def compile_counts(dtype: torch.dtype) -> None:
    """Compile the kernel that counts several tensors."""
    own = {"WIDE": dtype == torch.float32, "INFINITY": INFINITIES[dtype]}
    own |= {"ALIGNED": True, "BLOCK": 512}
    kinds = {name: "i64" if name in ("a0", "a1", "a2", "a3") else "i32" for name in cuda_zeros.TOLD}
    kinds |= {"zeros": "*i32", "finite": "*i8", "rows": "i32"} | dict.fromkeys(own, "constexpr")
    signature = {name: kinds[name] for name in cuda_zeros._count.arg_names}
    source = ASTSource(fn=cuda_zeros._count, signature=signature, constexprs=own)
    triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": cuda_zeros.WARPS})


def compile_sequences(bits: str, *, half: bool) -> None:
    """Compile the sums over sequences."""
    kinds = {"values": f"*{bits}", "first": "*i64"} | dict.fromkeys(
        ("tokens", "width", "runs"), "i32"
    )
    kinds |= dict.fromkeys(("counted", "kept", "whole", "mask"), "*i8")
    kinds |= dict.fromkeys(("onto", "out"), f"*{bits}") | {"zeros": "*i32"}
    kinds |= dict.fromkeys(("found", "weights", "partial", "sums"), "*fp64")
    lanes = {"HALF": half, "LANES": cuda_sequences.LANES, "STEPS": cuda_sequences.STEPS}
    block = {"BLOCK": cuda_sequences.BLOCK}
    runs = {"HALF": half, "RUN": cuda_sequences.RUN, "UNROLLED": cuda_sequences.UNROLLED} | block
    for kernel, own in (
        (cuda_sequences._energies, lanes),
        (cuda_sequences._runs, runs),
        (cuda_sequences._joined, block),
        (cuda_sequences._spread, {"EACH": True} | block),
        (cuda_sequences._leave_whole, block),
    ):
        types = kinds | dict.fromkeys(own, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=own)
        options = {"num_warps": cuda_sequences.WARPS, "enable_fp_fusion": False}
        text = triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]
        # Of a product that is rounded and a sum the masks would be others.
        assert "fma.rn.f64" not in text


for bits, half in (("i16", False), ("i16", True), ("i32", False)):
    compile_sequences(bits, half=half)
for dtype in (torch.bfloat16, torch.float32):
    compile_masks(dtype)
    compile_counts(dtype)
for rule in RULES:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        compile_kernel(cuda._mask, rule, dtype)
for dtype in (torch.bfloat16, torch.float32):
    compile_kernel(cuda._mask, Threshold("rank", 100), dtype, by_row=True)

CUT = {
    "LINES": 1,
    "UNITS": False,
    "STAGES": 1,
    "ALONE": False,
    "BK": 32,
    "BN": 256,
    "LANES": 4,
    "PER": 1,
    "LISTED": False,
}
LISTED = {**CUT, "PER": 512, "LISTED": True}
for choices in (
    {**CUT, "ACTIVATION": 1},
    LISTED,
    {**LISTED, "LINES": 16, "UNITS": True, "KEEP": 1},
):
    compile_product(cuda_inputs.by_inputs, "bf16", **choices)
compile_product(cuda_inputs.by_inputs, "fp32", **CUT, BIAS=True, BY_CHANNEL=True)
ROWS = {"BATCH": 1, "DECIDES": 0, "BR": 4, "BK": 512}
for choices in ({"KEEP": 0, "ACTIVATION": 1}, {"DECIDES": 1, "ACTIVATION": 2}, {"KEEP": 1}):
    compile_product(cuda_outputs.by_outputs, "bf16", **ROWS | choices)
compile_product(cuda_outputs.by_outputs, "fp32", **ROWS | {"BATCH": 16, "BR": 16, "BK": 64})


def compile_step(
    kernel: triton.JITFunction, constants: dict[str, int | bool], **others: str
) -> None:
    """Compile what stands between the products."""
    types = {name: "i32" for name in kernel.arg_names} | others
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    options = {"num_warps": 4, "launch_pdl": True}
    triton.compile(source, GPUTarget("cuda", 90, 32), options)


for dtype in ("bf16", "fp32"):
    pointers = dict.fromkeys(("x", "more", "weight", "total", "out"), f"*{dtype}")
    compile_step(
        cuda_step._normed, {"MORE": True, "BLOCK": 4096, "CHAINED": True}, **pointers, eps="fp32"
    )
    names = ("query", "key", "value", "cosines", "sines", "mask", "keys", "values", "out")
    pointers = dict.fromkeys(names, f"*{dtype}")
    pointers |= {"clock": "*i64", "partial": "*fp32", "arrived": "*i32", "scale": "fp32"}
    for split in (1, 9):
        constants = {"SPLIT": split, "WIDTH": 128, "PLACES": cuda_step._PLACES, "CHAINED": True}
        compile_step(cuda_step._attended, constants, **pointers)
