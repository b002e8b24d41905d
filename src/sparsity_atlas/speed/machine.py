"""What measured times are of: the device, its driver and clocks, and the libraries that multiply."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from sparsity_atlas.errors import AtlasError


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
