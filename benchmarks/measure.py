"""What the benchmarks share: time, tensors that look like activations, and the official algorithm."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Bytes a second between a card's memory and its processors, as its maker states them.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}


def machine(device: str) -> str:
    """Hardware and versions, in one line."""
    if device == "cuda":
        import triton

        name = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def bandwidth() -> float | None:
    """The card's stated bytes a second, if it is one that we know."""
    name = torch.cuda.get_device_name()
    return next((value for key, value in BANDWIDTH.items() if key in name), None)


def seconds(
    work: Callable[[], object],
    device: str,
    repeats: int = 10,
    *,
    captured: bool = False,
) -> float:
    """Time of one call, after a warm-up: the median on a GPU; on a CPU the best, in the process's own time.

    Other work on the machine hardly changes that. Set the number of threads to 1 for it to mean anything.

    Args:
        work: what is timed.
        device: where it runs.
        repeats: how often it is timed.
        captured: on a GPU, take the time of its kernels alone, from a graph of ten calls, without that
            in which the host starts them. The work must not wait for the device.
    """
    work()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)
    work()
    calls = 1
    if captured:
        calls, graph = 10, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graph.replay()
    run = graph.replay if captured else work
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / calls / 1e3


def host_seconds(work: Callable[[], object], calls: int = 200) -> float:
    """Time in which the host starts one call on a GPU: the best of several rounds."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return min(times)


def activations(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """u ⊙ SiLU(g) of normal u and g, each channel of g with a scale of its own: real tails."""
    torch.manual_seed(0)
    scale = torch.exp(0.7 * torch.randn(width, device=device))
    gate = torch.nn.functional.silu(torch.randn(rows, width, device=device) * scale)
    return (torch.randn(rows, width, device=device) * gate).to(dtype)


def official(values: Tensor, level: float) -> tuple[Tensor, list[int]]:
    """Top-p as the paper's code does it, written from its description.

    A full descending sort with its indices, a float64 running sum, the crossing entry by gather, and
    the number of zeros of each row copied to the host.
    """
    magnitude = values.abs()
    ranked, _ = magnitude.sort(dim=-1, descending=True)
    running = ranked.double().cumsum(-1)
    crossing = (running < level * running[..., -1:]).sum(-1, keepdim=True)
    crossing.clamp_(max=values.shape[-1] - 1)
    mask = magnitude >= ranked.gather(-1, crossing)
    return values * mask, (~mask).sum(-1).cpu().tolist()
