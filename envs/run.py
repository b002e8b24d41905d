#!/usr/bin/env python3
"""Run a command in the project's environment, which is made first if it is missing or out of date.

    python3 envs/run.py snakemake --cores all
    python3 envs/run.py pytest

Needs Python 3.11 or later and its venv module. The environment is .venv beside pyproject.toml; after
that, `source .venv/bin/activate` gives the same commands without this script.

torch comes in builds of very different size. On a machine with an NVIDIA GPU the build for its driver
is chosen. Without one a CPU build is: one that pip is configured to find (PIP_FIND_LINKS), else the
one that uv finds. Whatever `pip install` itself would take is the last resort.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "sparsity-atlas.stamp"
TORCH = "torch>=2.6,<2.14"


def say(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"envs/run.py: {text}\n")


def wanted_stamp() -> str:
    """Digest of what the environment is made from."""
    content = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def pip(*arguments: str) -> None:
    """Run the environment's pip; its failure ends the script with pip's own message."""
    subprocess.run(
        [BIN / "python", "-m", "pip", "--disable-pip-version-check", *arguments], check=True
    )


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def has_find_links() -> bool:
    """Whether pip is configured to look for packages in a folder or page beside the index."""
    listing = subprocess.run(
        [BIN / "python", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    return "find-links" in listing.stdout


def install_torch() -> None:
    """Install the build of torch that suits the machine."""
    if not has_gpu() and has_find_links():
        pip("install", "--quiet", TORCH)
        return
    pip("install", "--quiet", "uv")
    uv = [BIN / "uv", "pip", "install", "--quiet", "--python", BIN / "python"]
    if subprocess.run([*uv, "--torch-backend", "auto", TORCH]).returncode != 0:
        say("uv found no build of torch for this machine; leaving the choice to pip")
        pip("install", "--quiet", TORCH)


def make() -> None:
    """Make the environment."""
    say(f"setting up {VENV.name}/ (a few minutes, once)")
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    except subprocess.CalledProcessError:
        raise SystemExit(
            "envs/run.py: `python3 -m venv` failed; install Python's venv module"
        ) from None
    try:
        install_torch()
        pip("install", "--quiet", "--editable", f"{ROOT}[test]")
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"envs/run.py: set-up failed (pip exit code {error.returncode})") from None
    STAMP.write_text(wanted_stamp())


def main() -> None:
    """Make the environment if need be, then become the command."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this runs before pip could refuse)
        raise SystemExit(
            f"envs/run.py: needs Python 3.11 or later, this is {sys.version.split()[0]}"
        )
    if len(sys.argv) < 2:
        raise SystemExit("usage: python3 envs/run.py COMMAND [ARGUMENT ...]")
    if not STAMP.is_file() or STAMP.read_text() != wanted_stamp():
        make()
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(VENV),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONHOME", None)
    command = sys.argv[1]
    if shutil.which(command, path=environment["PATH"]) is None:
        raise SystemExit(f"envs/run.py: {command}: no such command")
    os.execvpe(command, sys.argv[1:], environment)


if __name__ == "__main__":
    main()
