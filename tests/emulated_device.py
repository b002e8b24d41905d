"""Kernels in CUDA C++ compiled for the CPU, and launched there; it takes a C compiler."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from torch import Tensor

from sparsity_atlas.decoding.cuda_sources import ENTRIES, SEARCH

DEVICE = Path(__file__).with_suffix(".c")


def launcher(folder: Path) -> Callable[..., None]:
    """What takes the place of `cuda_sources.launch`.

    Args:
        folder: for what is compiled.
    """
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    compiled: dict[tuple[tuple[str, object], ...], ctypes.CDLL] = {}

    def launch(
        source: str,
        defined: dict[str, int],
        grid: tuple[int, int],
        shared: int,
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
    ) -> None:
        file = resources.files("sparsity_atlas.decoding").joinpath(source)
        # Here each thread of a warp has a part of a sum.
        room = shared + 16 * defined["THREADS"]
        options = {**defined, "ROOM": room, "SOURCE": f'"{file}"', "KERNEL": ENTRIES[source]}
        if source in SEARCH:
            search = resources.files("sparsity_atlas.decoding").joinpath(SEARCH[source])
            options["SEARCH"] = f'"{search}"'
        options["ARGUMENTS"] = ", ".join(
            [
                *(f"given[{i}]" for i in range(len(tensors))),
                *(f"numbers[{i}]" for i in range(len(numbers))),
            ]
        )
        key = tuple(options.items())
        if key not in compiled:
            path = folder / f"kernel{len(compiled)}.so"
            subprocess.run(
                [
                    *(compiler, "-shared", "-fPIC", "-O1", "-w", "-o", path, DEVICE, "-lm"),
                    *(f"-D{name}={value}" for name, value in options.items()),
                ],
                check=True,
            )
            compiled[key] = ctypes.CDLL(str(path))
        pointers = (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))
        compiled[key].launch(pointers, (ctypes.c_int * len(numbers))(*numbers), grid[1])

    return launch
