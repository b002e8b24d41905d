"""The criteria's kernels against a copy of memory and against the official algorithm.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cuda --check --tune

`--check` compares the kernels with the definition first, bit for bit, for all types, rules and widths;
any difference, and any variant that does not compile, is listed and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import activations, bandwidth, host_seconds, machine, official, seconds
from sparsity_atlas import kernels
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.base import Criterion, SequenceCriterion
from sparsity_atlas.criteria.dense_prompt import DensePrompt
from sparsity_atlas.kernels import patterns
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.kernels.prompts import sequence_sums as sequences
from sparsity_atlas.sparsify.sparing import sparing

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (1, 896, 1001, 2048, 8192, 14336, 28671, 28672)
# Multiples of 1,024, those of models, and odd ones.
SWEPT = sorted(
    {*range(2048, 28673, 1024), 2304, 2560, 2816, 3584, 4864, 5632, 6912, 8960, 9728, 11008, 13824}
    | {17920, 18944, 22016, 2305, 3001, 4097, 8193, 11009, 14337, 18433, 22017, 28671}
)
PATTERN_WIDTHS = (1, 896, 1001, 14336)
LEVELS = (0.0, 0.3, 0.5, 0.75, 0.9, 0.98, 0.9999, 1.0)


def rule(name: str, width: int, level: float, device: str) -> Threshold:
    """A rule by its name in the tables."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(width, generator=generator).to(device)
    match name.split():
        case ["topp"]:
            return Threshold("share", level)
        case ["topp", "weighted"]:
            return Threshold("share", level, weights=weights)
        case ["topp", power]:
            return Threshold("share", level, float(power.removeprefix("q=")))
        case ["topk"]:
            return Threshold("rank", int(level * width))
        case ["topk", "weighted"]:
            return Threshold("rank", int(level * width), weights=weights)
        case ["maxp"]:
            return Threshold("peak", level)
        case ["fixed"]:
            return Threshold("fixed", constants=torch.tensor([level], device=device))
        case ["fixed", "by", "channel"]:
            return Threshold("fixed", constants=level * weights)
    raise ValueError(name)


OTHERS = (
    *("topp q=2", "topp q=3", "topp q=1.5", "topp q=40", "topp weighted"),
    *("topk", "topk weighted", "maxp", "fixed", "fixed by channel"),
)


class Case(NamedTuple):
    """One thing to check: every level of a rule on rows of every kind."""

    name: str
    dtype: str
    width: int
    device: str

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, width {self.width}"


def cases(device: str) -> list[Case]:
    """Top-p at every width, the other rules at an odd and at an even one."""
    found = [Case("topp", dtype, width, device) for width in WIDTHS for dtype in TYPES]
    for width in (1001, 14336):
        found += [Case(name, dtype, width, device) for name in OTHERS for dtype in TYPES]
    return sorted(found, key=lambda case: -case.width)


def hard_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of every kind that a kernel could get wrong, [rows, width] on the CPU."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(2, width, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-149, 127, (2, width), generator=generator)
    broken = normal.clone()
    broken[0, width // 2], broken[1, width - 1] = torch.nan, -torch.inf
    kinds = (
        *(normal, normal * torch.exp(3 * normal.flip(-1)), normal * 2.0**exponents),
        *((2 * normal).round(), normal.clamp(min=0), normal[:, :1].repeat(1, width)),
        *((4 * normal).round() * 2.0**-149, normal * 1e38, normal * 1e-38, 0 * normal),
        *(torch.where(normal.abs() > 2.5, normal * 100, normal), broken),
    )
    largest = torch.finfo(dtype).max
    return torch.cat([one.clamp(-largest, largest) for one in kinds]).to(dtype)


def failure(case: Case) -> str | None:
    """What is wrong with a case; None if nothing is."""
    values = hard_rows(case.width, TYPES[case.dtype])
    bits = torch.int32 if values.element_size() == 4 else torch.int16
    there = values.to(case.device)
    for level in LEVELS:
        for onto, onto_there in ((values, there), (values.flip(0), there.flip(0))):
            expected = kernels.reference(rule(case.name, case.width, level, "cpu"), values, onto)
            try:
                found = kernels.masked(
                    rule(case.name, case.width, level, case.device), there, onto_there
                )
                out, zeros, finite = (one.cpu() for one in found[:3])
            # A variant that fails must not hide the others.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split())
                return f"{case}, level {level}: {type(error).__name__}: {text[:300]}"
            wrong = (out.view(bits) != expected.out.view(bits)).sum(-1)
            if wrong.any():
                rows = wrong.nonzero().flatten().tolist()
                return f"{case}, level {level}: {int(wrong.sum())} entries differ, in rows {rows}"
            if not torch.equal(zeros.long(), expected.zeros.long()):
                return f"{case}, level {level}: masks are equal, counts of zeros are not"
            if not torch.equal(finite, expected.finite):
                return f"{case}, level {level}: broken rows are not told alike"
    return None


def patterns_failure(dtype: str, device: str) -> str | None:
    """What is wrong with masks that follow from no threshold, of a type; None if nothing is."""
    for width in PATTERN_WIDTHS:
        values = hard_rows(width, TYPES[dtype])
        there = values.to(device)
        made = torch.rand(values.shape, generator=torch.Generator().manual_seed(width)) < 0.5
        kinds = {
            "any": lambda _, made=made: made,
            "random": partial(patterns.drawn, salt=5, share=0.4),
        }
        kinds |= {
            f"{kept} of {size}": partial(patterns.largest_of_groups, size=size, kept=kept)
            for size, kept in ((2, 1), (4, 2), (7, 3), (32, 16))
        }
        for name, mask in kinds.items():
            onto, onto_there = values.flip(0), there.flip(0)
            os.environ[kernels.VARIABLE] = "reference"
            expected = kernels.by_mask(mask(values), values, onto)
            os.environ[kernels.VARIABLE] = "compiled"
            found = kernels.by_mask(mask(there).to(device), there, onto_there)
            for number, part in enumerate(("out", "zeros", "finite", "mask")):
                one, other = found[number].cpu(), expected[number]
                if number == 0:
                    bits = torch.int32 if one.element_size() == 4 else torch.int16
                    one, other = one.view(bits), other.view(bits)
                if not torch.equal(one, other.to(one.dtype)):
                    return f"masks, {name}, {dtype}, width {width}: {part} differs"
    return None


def check(device: str) -> bool:
    """Check all cases, several at a time because most of it is compiling; print what is wrong."""
    todo = cases(device)
    workers = max(1, min(12, (os.cpu_count() or 1) - 1)) if device == "cuda" else 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        failures = [found for found in pool.map(failure, todo) if found]
    for text in failures:
        print(f"WRONG  {text}")
    print(
        f"check: {len(todo) - len(failures)} of {len(todo)} cases equal the definition, bit for bit",
        flush=True,
    )
    return not failures


def check_patterns(device: str) -> bool:
    """Check masks that follow from no threshold; print what is wrong."""
    failures = [found for dtype in TYPES if (found := patterns_failure(dtype, device))]
    for text in failures:
        print(f"WRONG  {text}")
    print(
        f"check: masks without a threshold: {len(failures)} of {len(TYPES)} types wrong", flush=True
    )
    return not failures


def sequences_failure(dtype: str, device: str) -> str | None:
    """What is wrong with sums over sequences, of a type; None if nothing is."""
    for width in PATTERN_WIDTHS:
        rows = hard_rows(width, TYPES[dtype])
        # Longer than a run, with padding before and behind; of each kind and with each other.
        values = rows.repeat(-(-3 * sequences.RUN // len(rows)), 1)[: 2 * sequences.RUN + 100]
        values = torch.stack([values, values.flip(0)])
        counted = torch.rand(values.shape[:2], generator=torch.Generator().manual_seed(width)) < 0.9
        counted[0, :33], counted[1, -40:] = False, False
        os.environ[kernels.VARIABLE] = "reference"
        energies = sequences.energies(values, counted)
        usable = (energies > 0) & (energies < torch.inf)
        weights = torch.where(usable, 1 / energies, 0)
        expected = energies, sequences.over_tokens(values, weights)
        os.environ[kernels.VARIABLE] = "compiled"
        there, chosen = values.to(device), counted.to(device)
        found = (
            sequences.energies(there, chosen),
            sequences.over_tokens(there, weights.to(device)),
        )
        for name, one, other in zip(("energies", "sums"), found, expected, strict=True):
            # NaN alike, whatever its bits.
            if not torch.equal(one.cpu().nan_to_num(-1), other.nan_to_num(-1)):
                return f"sequences, {dtype}, width {width}: {name} differ"
    return None


def check_sequences(device: str) -> bool:
    """Check sums over sequences; print what is wrong."""
    failures = [found for dtype in TYPES if (found := sequences_failure(dtype, device))]
    for text in failures:
        print(f"WRONG  {text}")
    print(f"check: sums over sequences: {len(failures)} of {len(TYPES)} types wrong", flush=True)
    return not failures


def check_counts(device: str) -> bool:
    """Check zeros that several tensors are counted for at once; print what is wrong."""
    everything = Threshold("fixed", constants=torch.zeros(1))
    failures = []
    for name, dtype in TYPES.items():
        rows = [hard_rows(width, dtype) for width in WIDTHS]
        # Half of a wider tensor, too.
        rows += [torch.cat([one, one], 1)[:, one.shape[1] :] for one in rows]
        shape = len(rows), len(rows[0])
        zeros = torch.empty(shape, dtype=torch.int32, device=device)
        finite = torch.empty(shape, dtype=torch.bool, device=device)
        there = [one.to(device) for one in rows]
        if not kernels.counts_together(there[0]):
            print(f"check: on {device} each tensor is counted by itself")
            return True
        kernels.count_together(there, range(len(rows)), zeros, finite)
        for number, one in enumerate(rows):
            expected = kernels.reference(everything, one, one)
            if zeros[number].tolist() != expected.zeros.tolist():
                failures.append(f"{name}, width {one.shape[1]}: zeros of several tensors")
            if finite[number].tolist() != expected.finite.tolist():
                failures.append(f"{name}, width {one.shape[1]}: broken rows of several tensors")
    for text in failures:
        print(f"WRONG  {text}")
    print(f"check: zeros of several tensors at once: {len(failures)} wrong", flush=True)
    return not failures


def table(device: str, rows: int, widths: list[int], dtypes: list[str], level: float) -> None:
    """Top-p at several widths, beside a copy and the official algorithm."""
    print(f"\ntop-p, p = {level:g}, {rows:,} vectors; ms")
    print("type  width |    ours    copy official | ours/copy official/ours |  GB/s of the limit")
    for dtype in dtypes:
        for width in widths:
            values = activations(rows, width, TYPES[dtype], device)
            target = torch.empty_like(values)
            made = rule("topp", width, level, device)
            ours = seconds(partial(kernels.masked, made, values, values), device, 20, captured=True)
            copy = seconds(partial(target.copy_, values), device, 20, captured=True)
            theirs = seconds(partial(official, values, level), device, 3)
            speed = 2 * values.nbytes / ours
            limit = bandwidth() if device == "cuda" else None
            share = f"{speed / limit:8.0%}" if limit else " " * 8
            print(
                f"{dtype}  {width:>5} | {ours * 1e3:7.3f} {copy * 1e3:7.3f} {theirs * 1e3:8.2f} | "
                f"{ours / copy:9.2f} {theirs / ours:13.1f} | {speed / 1e9:5.0f} {share}"
            )


def sweep(rows: int, level: float) -> bool:
    """On a GPU: top-p at many widths in each type, beside a copy and against the definition.

    Returns:
        whether all masks and counts were the definition's.
    """
    good = True
    for dtype, kind in TYPES.items():
        print(
            f"\nevery width, {dtype}, p = {level:g}, {rows:,} vectors: width, ours, a copy, in ms; ratio"
        )
        worst = 0.0, 0
        bits = torch.int32 if kind == torch.float32 else torch.int16
        for width in SWEPT:
            values = activations(rows, width, kind, "cuda")
            target, made = torch.empty_like(values), rule("topp", width, level, "cuda")
            ours = seconds(partial(kernels.masked, made, values, values), "cuda", 20, captured=True)
            copy = seconds(partial(target.copy_, values), "cuda", 20, captured=True)
            hard = torch.cat([hard_rows(width, kind).cuda(), values[:64]])
            found = kernels.masked(made, hard, hard)
            expected = kernels.reference(made, hard, hard)
            same = torch.equal(found.out.view(bits), expected.out.view(bits))
            same &= torch.equal(found.zeros.long(), expected.zeros.long())
            same &= torch.equal(found.finite, expected.finite)
            good &= same
            worst = max(worst, (ours / copy, width))
            wrong = "" if same else "WRONG"
            times = f"{ours * 1e3:8.4f} {copy * 1e3:8.4f} {ours / copy:6.2f}"
            print(f"{width:>6} {times} {wrong}", flush=True)
        print(f"worst: {worst[0]:.2f} copies at {worst[1]:,}")
    return good


def rules_table(device: str, rows: int, width: int, dtype: str) -> None:
    """Every rule at one width, beside a copy."""
    values = activations(rows, width, TYPES[dtype], device)
    target = torch.empty_like(values)
    copy = seconds(partial(target.copy_, values), device, 20, captured=True)
    print(
        f"\nevery rule, {dtype}, {rows:,} vectors of width {width}; a copy takes {copy * 1e3:.3f} ms"
    )
    for name in ("topp", *OTHERS):
        for level in (0.5, 0.9, 0.98):
            made = rule(name, width, level, device)
            try:
                ours = seconds(partial(kernels.masked, made, values, values), device, captured=True)
            # As above.
            except Exception as error:  # noqa: BLE001
                print(f"{name:<17} {level:4.2f} | {type(error).__name__}")
                continue
            print(f"{name:<17} {level:4.2f} | {ours * 1e3:7.3f} ms, {ours / copy:5.2f} of a copy")


def drop_half(criterion: Criterion, values: Tensor) -> kernels.Masked:
    """What a criterion that has a mask of its own does at 0.5."""
    return kernels.by_mask(criterion.mask(values, 0.5), values, values)


def by_patterns(device: str, rows: int, width: int, dtype: str) -> bool:
    """Criteria whose masks follow from no threshold, beside a copy and their definitions in torch.

    Returns:
        whether what is kept, and the counts, are the definitions'.
    """
    values = activations(rows, width, TYPES[dtype], device)
    target = torch.empty_like(values)
    copy = seconds(partial(target.copy_, values), device, 20, captured=True)
    print(f"\nno threshold, {dtype}, {rows:,} vectors of width {width}; ms, over a copy; in torch")
    good = True
    for spec in ({"rule": "nm"}, {"rule": "nm", "group": 32}, {"rule": "random"}):
        work = partial(drop_half, create(spec), values)
        good &= beside_torch(" ".join(map(str, spec.values())), work, device, copy)
    return good


def beside_torch(
    name: str, work: Callable[[], Any], device: str, copy: float, *, captured: bool = False
) -> bool:
    """Time what kernels do and what their definition in torch does, and print both.

    Args:
        name: of the row.
        work: makes a tensor, or several of which the first three are compared.
        device: where.
        copy: seconds that a copy takes.
        captured: whether kernels are timed in a captured graph.

    Returns:
        whether both make the same.
    """
    ours, found = seconds(work, device, 5, captured=captured), work()
    os.environ[kernels.VARIABLE] = "reference"
    plain, expected = seconds(work, device, 2), work()
    os.environ[kernels.VARIABLE] = "compiled"
    pairs = zip(
        *((one,) if torch.is_tensor(one) else one[:3] for one in (found, expected)), strict=True
    )
    same = all(torch.equal(one, other.to(one.dtype)) for one, other in pairs)
    print(
        f"{name:<16} | {ours * 1e3:8.3f} ({ours / copy:.2f}), {plain * 1e3:9.3f} "
        f"({plain / ours:.1f} times) | {'same' if same else 'WRONG'}"
    )
    return same


def by_prompts(device: str, shape: tuple[int, int, int], dtype: str) -> bool:
    """Criteria whose masks follow from whole prompts, beside a copy and their definitions in torch.

    Args:
        device: where.
        shape: sequences, tokens, and entries of one; the first half of each is the prompt.
        dtype: of the values.

    Returns:
        whether what is kept, and the counts, are the definitions'.
    """
    batch, tokens, width = shape
    values = activations(batch * tokens, width, TYPES[dtype], device).view(shape)
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    target = torch.empty_like(values)
    copy = seconds(partial(target.copy_, values), device, 20, captured=True)
    print(
        f"\nprompts, {dtype}, {batch} of {tokens} tokens, width {width}; ms, over a copy; in torch"
    )
    good = True

    def masked(criterion: SequenceCriterion) -> kernels.Masked:
        mask = criterion.mask_sequences(values, valid, "scoring", 0.5)
        return kernels.by_mask(mask, values, values)

    topp = rule("topp", width, 0.9, device)
    half = sparing(
        lambda values, onto, _=None: kernels.masked(topp, values, onto),
        DensePrompt(share=Fraction(1, 2)),
        lambda _: (valid, "scoring"),
    )
    prompt_mask, own = (
        create({"rule": "prompt_mask"}),
        create({"rule": "prompt_mask", "after": "own"}),
    )
    works = {
        "prompt_mask": partial(masked, prompt_mask),
        "its neurons": partial(prompt_mask.neurons, values, prompt_mask.prompt_of(valid), 0.5),
        "after: own": partial(masked, own),
        "topp, half dense": partial(half, values, values),
    }
    for name, work in works.items():
        good &= beside_torch(name, work, device, copy, captured=True)
    return good


def ffn(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """A gated FFN with SiLU."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def share_of_ffn(rows: int, width: int, level: float) -> None:
    """On the CPU: the kernel's share of the time of the dense FFN that it stands in."""
    hidden = 2048
    print(f"\nshare of a dense FFN {hidden} to {width}, {rows:,} vectors, p = {level:g}; ms")
    for dtype in ("fp32", "bf16"):
        kind = TYPES[dtype]
        x = torch.randn(rows, hidden).to(kind)
        up, gate, down = (
            (torch.randn(shape) / shape[1] ** 0.5).to(kind)
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        )
        dense = seconds(partial(ffn, x, up, gate, down), "cpu", 3)
        values = activations(rows, width, kind, "cpu")
        made = rule("topp", width, level, "cpu")
        ours = seconds(partial(kernels.masked, made, values, values), "cpu", 20)
        theirs = seconds(partial(official, values, level), "cpu", 2)
        print(
            f"{dtype}: FFN {dense * 1e3:.1f}, ours {ours * 1e3:.2f} ({ours / dense:.2%}), "
            f"official {theirs * 1e3:.0f} ({theirs / dense:.0%})"
        )


def launches() -> None:
    """On a GPU: how long the host takes to start a kernel, which counts where a pass has few tokens."""
    values = activations(8, 2048, torch.bfloat16, "cuda")
    ours = partial(kernels.masked, rule("topp", 2048, 0.9, "cuda"), values, values)
    ours()
    print(
        f"\nthe host starts the kernel in {host_seconds(ours) * 1e6:.0f} us, "
        f"torch's x * x in {host_seconds(partial(torch.mul, values, values)) * 1e6:.0f} us"
    )


def tune(rows: int) -> None:
    """On a GPU: how rows are cut for the kernel in CUDA C++, which takes what `cuda_share.cut_of` says."""
    from sparsity_atlas.kernels import cuda_share

    built_in = cuda_share.cut_of
    print(f"\nvectors a thread x threads (blocks at least), {rows:,} vectors; ms")
    for dtype, width in itertools.product(TYPES, (2048, 8192, 14336, 28672)):
        values = activations(rows, width, TYPES[dtype], "cuda")
        made, line = rule("topp", width, 0.9, "cuda"), []
        for each in (2, 4, 6, 7, 8):
            threads = -(-width * values.element_size() // (16 * 32 * each)) * 32
            for blocks in {max(1, most // threads) for most in (512, 768, 1024)}:
                if threads > 1024 or threads * blocks > 2048:
                    continue
                cut = cuda_share.Cut(threads, each, blocks)
                cuda_share.cut_of = lambda *_, cut=cut: cut
                took = seconds(partial(kernels.masked, made, values, values), "cuda", captured=True)
                line.append(f"{each} x {threads} ({blocks}): {took * 1e3:.3f}")
        chosen = built_in(made, width, TYPES[dtype])
        print(f"{dtype} {width:>5} | {'  '.join(line)} | built in: {chosen}")
    cuda_share.cut_of = built_in


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--check", action="store_true", help="compare with the definition first")
    parser.add_argument("--tune", action="store_true", help="try other launch settings (cuda)")
    parser.add_argument("--sweep", action="store_true", help="top-p at many widths (cuda)")
    parser.add_argument("--rows", type=int, help="vectors; 8192 on a GPU, 512 on a CPU")
    parser.add_argument("--level", type=float, default=0.9)
    arguments = parser.parse_args()

    os.environ[kernels.VARIABLE] = "compiled"
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    print(machine(arguments.device))
    checks = (check, check_patterns, check_sequences, check_counts) if arguments.check else ()
    good = all([one(arguments.device) for one in checks])
    if arguments.device == "cuda":
        rows = arguments.rows or 8192
        table("cuda", rows, [896, 2048, 4096, 8192, 11008, 14336, 28672], ["bf16"], arguments.level)
        table("cuda", rows, [8192, 14336], ["fp16", "fp32"], arguments.level)
        rules_table("cuda", rows, 14336, "bf16")
        good &= by_patterns("cuda", rows, 14336, "bf16")
        good &= by_prompts("cuda", (4, 2048, 14336), "bf16")
        launches()
        if arguments.sweep:
            good &= sweep(rows, arguments.level)
        if arguments.tune:
            tune(rows)
    else:
        rows = arguments.rows or 512
        table("cpu", rows, [2048, 8192, 14336, 28672], ["fp32", "bf16"], arguments.level)
        rules_table("cpu", rows, 8192, "fp32")
        good &= by_patterns("cpu", rows, 8192, "fp32")
        good &= by_prompts("cpu", (4, 128, 8192), "fp32")
        for width in (2048, 8192):
            share_of_ffn(rows, width, arguments.level)
    sys.exit(not good)


if __name__ == "__main__":
    main()
