"""A model over two GPUs against the same model on one: python tests/placement_on_device.py.

CI has none. What the unit test shows with a disk is shown here with GPUs, by the same stages (evaluation with
generation, capture, output error, sensitivity, calibration): a small model in float32 and a larger one in
bfloat16, on one GPU, on both, and on both with a part that waits in host memory. Ends with 1 if they differ.
"""

from __future__ import annotations

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

# The GPUs that a process sees; on more than one, models are spread.
WAYS = {"one": "0", "both": "0,1", "waiting": "0,1"}
LARGE: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12},
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
    spread = {} if way == "one" else {"device_map": "auto"}
    found = test_placement.stages(
        folder, output.with_suffix("") / "results", {"device": "cuda", "dtype": dtype, **spread}
    )
    memory = [torch.cuda.max_memory_allocated(i) >> 20 for i in range(torch.cuda.device_count())]
    say(f"{dtype} {way}: a part waits: {found['waits']}, peaks {memory} MiB")
    output.write_bytes(pickle.dumps(found))


def main() -> None:
    """Run each way in a process of its own, and compare."""
    base = Path(tempfile.mkdtemp())
    models: dict[str, dict[str, Any]] = {"float32": {"num_hidden_layers": 6}, "bfloat16": LARGE}
    good = True
    for dtype, sizes in models.items():
        folder = save_model(base / dtype, **sizes)
        found = {}
        for way, gpus in WAYS.items():
            began = time.monotonic()
            output = base / f"{dtype}-{way}.pickle"
            command = [sys.executable, __file__, way, dtype, str(folder), str(output)]
            subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus})
            found[way] = pickle.loads(output.read_bytes())
            assert found[way].pop("waits") == (way == "waiting")
            differs = [name for name, value in found[way].items() if value != found["one"][name]]
            say(f"{dtype} {way}: {time.monotonic() - began:.0f} s, differs: {differs or 'nothing'}")
            good &= not differs
    sys.exit(not good)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_way(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
