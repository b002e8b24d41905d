"""What measured times are of: the device, its driver and clocks, and the libraries that multiply.

And that one job at a time measures them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError


@contextlib.contextmanager
def alone(folder: Path | None = None) -> Iterator[None]:
    """Wait until no other job of this user times on this machine, and keep others waiting.

    A job asks for all cores; with `--cores` above the machine's, or in a second run, another one starts.

    Args:
        folder: of the lock file; by default the system's for temporary files, which is the machine's own.
    """
    # Named by the user: nobody may open the lock file of another one in a shared /tmp.
    path = Path(folder or tempfile.gettempdir()) / f"sparsity-atlas-{os.getuid()}-speed.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cli.logger.info("another job measures times on this machine; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        # The kernel frees it when its holder ends, however that is.
        yield


def machine(device: str) -> dict[str, str]:
    """Columns `device`, `driver` (with its largest clocks) and `versions`.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        AtlasError: the library of its kernels is not installed.
    """
    library = "numba" if device == "cpu" else "triton"
    try:
        versions = f"torch {torch.__version__}, {library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        raise AtlasError(f"speed: device: {device}: {library} is not installed") from None
    if device == "cpu":
        threads = torch.get_num_threads()
        named = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
        return {"device": named, "driver": "", "versions": versions}
    # Some kernels are CUDA C++ where this is there.
    bindings = next(iter(metadata.distributions(name="cuda-bindings")), None)
    if bindings is not None:
        versions += f", cuda-bindings {bindings.version}"
    driver, tool = "", shutil.which("nvidia-smi")
    if tool:
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"
        # By its own name: the tool counts GPUs that this process may not see.
        own = f"GPU-{torch.cuda.get_device_properties().uuid}"
        asked = [tool, f"--id={own}", query, "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        driver = "" if done.returncode else done.stdout.strip()
    return {"device": torch.cuda.get_device_name(), "driver": driver, "versions": versions}


def _processor() -> str:
    """As Linux names it, else its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, f"{platform.machine()} CPU")
