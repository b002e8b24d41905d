"""A model over two GPUs against the same model on one: python tests/placement_on_device.py.

CI has none. What the unit test shows with a disk is shown here with GPUs, by the same stages (evaluation with
generation, capture, output error, sensitivity, calibration): a small model in float32 and a larger one in
bfloat16, on one GPU, on the other, on both, and on both with a part that waits in host memory; all at once.
Says what differs from the first, and ends with 1 if anything does, or if a model lay where it should not.
Before all that it tries whether numbers come from one GPU to the other. What has not ended after SECONDS is
stopped, and where it stood is said.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "unit" / "loading"), str(HERE), str(HERE.parent / "src")]
for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
    os.environ.setdefault(name, tempfile.mkdtemp(prefix="placement-"))
os.environ["HF_HUB_OFFLINE"] = "1"

import test_placement  # noqa: E402
import torch  # noqa: E402

from sparsity_atlas.loading import placement  # noqa: E402
from tiny_lm import save_model  # noqa: E402

# The GPUs that a process sees; on more than one, models are spread. The second is the first one's control.
WAYS = {"one": "0", "other": "1", "both": "0,1", "waiting": "0,1"}
SPREAD = ("both", "waiting")
# All of it, of which nothing should take a quarter.
SECONDS = int(os.environ.get("SECONDS_AT_MOST", "75"))
# Between two looks of a process at where it stands, which are shown if it does not end.
LOOK, SHOWN = 12, 6000
COPY = """
import time, torch
for of, to in ((0, 1), (1, 0)):
    for size in (1, 2**24):
        there = torch.arange(size, device=f"cuda:{of}")
        began = time.monotonic()
        right = torch.equal(there.to(f"cuda:{to}").cpu(), there.cpu())
        seconds = time.monotonic() - began
        print(f"{of} to {to}: {size} numbers, equal: {right}, {seconds:.3f} s", flush=True)
        assert right
print("peers:", torch.cuda.can_device_access_peer(0, 1), flush=True)
"""
LARGE: dict[str, Any] = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8},
    **{"num_attention_heads": 16, "dtype": torch.bfloat16, "initializer_range": 0.02},
}


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def one_way(way: str, dtype: str, folder: Path, output: Path) -> None:
    """Run the stages in this process."""
    if way == "waiting":
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        limits: placement.Limits = {0: size // 2, 1: size // 3, "cpu": size}
        vars(placement)["spread"] = partial(placement.spread, limits=limits)
    spread = {"device_map": "auto"} if way in SPREAD else {}
    found = test_placement.stages(
        folder, output.with_suffix("") / "results", {"device": "cuda", "dtype": dtype, **spread}
    )
    found["peaks"] = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    output.write_bytes(pickle.dumps(found))


def start(base: Path, way: str, dtype: str, folder: Path) -> subprocess.Popen[bytes]:
    """Begin a way in a process of its own. Locks on GPUs lie in TMPDIR: none waits for another."""
    locks, output = base / f"{dtype}-{way}-tmp", base / f"{dtype}-{way}.pickle"
    locks.mkdir()
    command = [sys.executable, __file__, way, dtype, str(folder), str(output)]
    seen = {"CUDA_VISIBLE_DEVICES": WAYS[way], "TMPDIR": str(locks)}
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, **seen}, stdout=log, stderr=log)


def copied() -> bool:
    """Whether numbers come from one GPU to the other, and soon."""
    try:
        told = subprocess.run(
            [sys.executable, "-c", COPY],
            capture_output=True,
            text=True,
            timeout=SECONDS / 3,
            check=False,
        )
    except subprocess.TimeoutExpired as slow:
        say(f"FAIL copies from GPU to GPU: not there after {slow.timeout:.0f} s: {slow.stdout!r}")
        return False
    say(
        f"{'FAIL' if told.returncode else 'PASS'} copies from GPU to GPU: {told.stdout}{told.stderr}"
    )
    return not told.returncode


def faults(way: str, found: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """What is wrong with a way's results, of those that are compared with the first way's."""
    peaks = found.pop("peaks")
    wrong = [name for name, value in found.items() if name != "waits" and value != first.get(name)]
    if found["waits"] != (way == "waiting"):
        wrong.append("whether a part waits in host memory")
    if way in SPREAD and not all(peaks):
        wrong.append(f"which GPUs it was on, of peaks of {peaks} bytes")
    if {status for rule in test_placement.RULES for status in found[rule][0].values()} != {"ok"}:
        wrong.append("a task without a result")
    return wrong


def main() -> None:
    """Run every way of both models, and compare."""
    if torch.cuda.device_count() < 2:
        sys.exit(f"placement: needs two GPUs, found {torch.cuda.device_count()}")
    base = Path(tempfile.mkdtemp())
    began = time.monotonic()
    good = copied()
    models: dict[str, dict[str, Any]] = {"float32": {"num_hidden_layers": 6}, "bfloat16": LARGE}
    running: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
    for dtype, sizes in models.items():
        # Drawn on one core they would take longer than all that is tried with them.
        with torch.device("cuda"):
            folder = save_model(base / dtype, **sizes)
        running |= {(dtype, way): start(base, way, dtype, folder) for way in WAYS}
    say(f"begun after {time.monotonic() - began:.0f} s")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (dtype, way), process in running.items():
        left = began + SECONDS - time.monotonic()
        try:
            process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            process.kill()
        output = base / f"{dtype}-{way}.pickle"
        if process.wait():
            log = output.with_suffix(".log").read_text(errors="replace")
            wrong = [f"all, it ended with {process.returncode}: {log[-SHOWN:]}"]
        else:
            found[dtype, way] = pickle.loads(output.read_bytes())
            wrong = faults(way, found[dtype, way], found.get((dtype, "one"), {}))
        seconds = time.monotonic() - began
        say(
            f"{'FAIL' if wrong else 'PASS'} {dtype} {way}, {seconds:.0f} s: differs: "
            f"{', '.join(wrong) or 'nothing'}"
        )
        good &= not wrong
    seconds, gpu = time.monotonic() - began, torch.cuda.get_device_name(0)
    say(f"placement: {'PASS' if good else 'FAIL'}, {seconds:.0f} s, {gpu}")
    sys.exit(not good)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        faulthandler.dump_traceback_later(LOOK, repeat=True)
        one_way(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
