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

from sparsity_atlas.decoding.cuda_sources import ENTRIES

DEVICE = Path(__file__).with_suffix(".c")


def launcher(folder: Path) -> Callable[..., None]:
    """What takes the place of `cuda_sources.launch`.

    Args:
        folder: for what is compiled.
    """
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]

    def launch(
        source: str,
        defined: dict[str, int],
        grid: tuple[int, int],
        shared: int,
        tensors: Sequence[Tensor],
        numbers: tuple[int, int],
    ) -> None:
        path = folder / f"kernel{len(list(folder.iterdir()))}.so"
        file = resources.files("sparsity_atlas.decoding").joinpath(source)
        options = {**defined, "ROOM": shared, "SOURCE": f'"{file}"', "KERNEL": ENTRIES[source]}
        subprocess.run(
            [
                *(compiler, "-shared", "-fPIC", "-O1", "-w", "-o", path, DEVICE, "-lm"),
                *(f"-D{name}={value}" for name, value in options.items()),
            ],
            check=True,
        )
        pointers = (ctypes.c_void_p(one.data_ptr()) for one in tensors)
        ctypes.CDLL(str(path)).launch(*pointers, *numbers, grid[1])

    return launch
