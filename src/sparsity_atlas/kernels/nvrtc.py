"""CUDA C++, compiled when it is first needed.

An optional way: `cuda.bindings` and its NVRTC come with torch for CUDA. Where they are missing, and on
devices older than Hopper, Triton does it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas.files.kept_bytes import keep, kept_path, read_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@functools.cache
def is_there(device: torch.device) -> bool:
    """Whether a device is of Hopper or later, and this Python has what compiles for it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "cuda":
            raise
        return False
    return True


def compiled(text: bytes, name: str, defined: Mapping[str, int], architecture: str) -> bytes:
    """Machine code of a kernel.

    Args:
        text: of its file.
        name: of its file, for the compiler's words.
        defined: what the file wants to be fixed.
        architecture: as NVRTC calls it.

    Raises:
        RuntimeError: with the compiler's words.
    """
    from cuda.bindings import nvrtc

    program = done(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defined.items()]
    found = nvrtc.nvrtcCompileProgram(program, len(options), [one.encode() for one in options])
    if int(found[0]):
        log = b" " * done(nvrtc.nvrtcGetProgramLogSize(program))
        done(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    code: bytes = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
    done(nvrtc.nvrtcGetCUBIN(program, code))
    done(nvrtc.nvrtcDestroyProgram(program))
    return code


def kept(
    text: bytes,
    name: str,
    defined: Mapping[str, int],
    architecture: str,
    version: Sequence[int],
) -> bytes:
    """As `compiled`, or what another process has made of the same: one takes a second or two.

    Args:
        text: of its file.
        name: of its file.
        defined: what the file wants to be fixed.
        architecture: as NVRTC calls it.
        version: of NVRTC.
    """
    made_of = [text.decode(), sorted(defined.items()), architecture, list(version)]
    path = kept_path("cuda", made_of, ".cubin")
    code = read_kept(path)
    if code is None:
        code = compiled(text, name, defined, architecture)
        keep(path, code, "compiled kernels")
    return code


def loaded(
    text: bytes, name: str, entry: str, defined: Mapping[str, int], device: torch.device
) -> Any:
    """A kernel of a file, ready for a device; see `kept`.

    Args:
        text: of its file.
        name: of its file.
        entry: the kernel's name there.
        defined: what the file wants to be fixed.
        device: on which torch has done something, so that the driver has its context.
    """
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    error, *version = nvrtc.nvrtcVersion()
    done((error,))
    code = kept(text, name, defined, f"sm_{major}{minor}", version)
    with torch.cuda.device(device):
        module = done(driver.cuModuleLoadData(code))
    return done(driver.cuModuleGetFunction(module, entry.encode()))


def done(found: tuple[Any, ...]) -> Any:
    """What a call of the driver or of the compiler gave, if it went well."""
    error, *made = found
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return made[0] if made else None
