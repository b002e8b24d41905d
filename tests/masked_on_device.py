"""A masked-diffusion model on a GPU, beside the same one on the CPU: python tests/masked_on_device.py.

CI has none. Tasks of all types are run on both by models with a rule attached, at every site: scores, texts,
zeros, and what masks do from step to step; then broken off and resumed. In float32 all of it is the same but
for rounding, which may move an entry over its threshold. In bfloat16 a GPU's scores may lie twice as far as
the CPU's in bfloat16 do from those of float32 with the same weights, and the last
steps of a text may run on one side alone. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "unit" / "lm" / "masked")]
for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ[name] = tempfile.mkdtemp(prefix="masked-")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import test_masked_lm as tests  # noqa: E402
import torch  # noqa: E402

from interruptions import Interrupted, products  # noqa: E402
from masked_diffusion import save_diffusion  # noqa: E402
from on_device import failures  # noqa: E402
from sparsity_atlas.evaluation.evaluate import evaluate_node  # noqa: E402
from sparsity_atlas.evaluation.node import Node  # noqa: E402
from sparsity_atlas.evaluation.step_table import NAME, read_table  # noqa: E402
from sparsity_atlas.lm.masked.masked_lm import MaskedLM  # noqa: E402
from sparsity_atlas.terms import SITES  # noqa: E402
from tiny_lm import open_session, write_model_manifest  # noqa: E402

# By how much nats a predicted token may differ in float32, and shares of entries: one that moves over its
# threshold moves others behind it.
NATS = 1e-4
SHARES = {"float32": 2e-3, "bfloat16": 3e-2}
MIXTURE = {
    **{"kind": "olmoe", "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16},
    "num_key_value_heads": 2,
}
# Each head has keys and values of its own: where two share them and all tokens in sight are the mask, what
# they make is equal but for rounding, and rounding decides which of two such entries is kept (in up to 9 % of
# the vectors that o_proj reads, by the draw of the weights).
OWN = {"num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": OWN,
    "qwen2": {"kind": "qwen2", **OWN},
    "olmoe": MIXTURE,
}
# Sites of the others.
FEW = ("intermediate", "all_linear_inputs")
SETTINGS = {"samples": 5, "guidance": 0.5, "steps": 3}


class Bench:
    """One model, run on both.

    Args:
        kind: of `MODELS`.
        device: the GPU's.
    """

    def __init__(self, kind: str, device: str) -> None:
        self.folder, self.device = Path(tempfile.mkdtemp()), device
        model = save_diffusion(self.folder / "m", dtype=torch.bfloat16, **MODELS[kind])
        self.manifest = write_model_manifest(model, self.folder / "model.json")
        # Of the module's own fixture.
        self.tasks = tests.tasks.__wrapped__(model)
        self.times = 0
        self.wanted: dict[tuple[str | None, str], Path] = {}

    def run(self, device: str, dtype: str, node: Node | None, stop: int | None = None) -> Path:
        """A node's folder."""
        self.times += 1
        folder = self.folder / f"run-{self.times}"
        changes = {"device": device, "dtype": dtype, "diffusion": SETTINGS, "batch_size": 4}
        if stop is not None:
            _break_off(lambda: evaluate_node(self._session(changes), node, folder), stop)
        evaluate_node(self._session(changes), node, folder)
        return folder

    def _session(self, changes: dict[str, Any]) -> Any:
        return open_session(self.manifest, self.tasks, **changes)

    def node(self, site: str | None, dtype: str) -> None:
        """A node here and there."""
        node = None if site is None else Node.make({"rule": "topp"}, site, "0.8")
        for kind in ("float32", dtype):
            if (site, kind) not in self.wanted:
                self.wanted[site, kind] = self.run("cpu", kind, node)
        wanted, found = self.wanted[site, "float32"], self.run(self.device, dtype, node)
        there, off = tests.rows(found), _off(wanted, found)
        furthest = 0.0
        for task, own in tests.rows(wanted).items():
            for one, other in zip(own, there[task], strict=True):
                # In 16 bits another token may be the surest, and a text end a block earlier.
                phases = ("scoring", "denoising") if dtype == "float32" else ("scoring",)
                for phase in phases:
                    assert other[f"{phase}_tokens"] == one[f"{phase}_tokens"], (task, phase)
            far = np.abs(_shares(wanted, task) - _shares(found, task)).max()
            assert far <= SHARES[dtype], (task, far)
            furthest = max(furthest, float(far))
        allowed = f"{NATS:.1e} each"
        if dtype == "float32":
            assert off.max() <= NATS, off.max()
        else:
            usual = _off(wanted, self.wanted[site, dtype])
            assert off.mean() <= 2 * usual.mean(), (off.mean(), usual.mean())
            allowed = f"{2 * usual.mean():.1e}"
        worst = 0.0
        if site is not None:
            steps = [
                _kept(read_table(at / NAME).rows["words"].to_pylist()) for at in (wanted, found)
            ]
            both = steps[0].keys() & steps[1].keys()
            # As above: in 16 bits the last steps may run on one side alone, the first ones run on both.
            alone = {key for one in steps for key in one.keys() - both}
            assert both, "no step in common"
            assert not {key for key in alone if dtype == "float32" or key[0] == 0}, alone
            worst = max(abs(steps[0][key] - steps[1][key]) for key in both)
            assert worst <= 10 * SHARES[dtype], worst
        told = f"nats a token {off.mean():.1e} (allowed {allowed}), zeros {furthest:.1e}"
        print(f"       {told}, shares kept by step {worst:.1e}")  # noqa: T201

    def resumed(self) -> None:
        """Broken off in each third batch: the same bytes."""
        node = Node.make({"rule": "topp"}, "all_inputs", "0.8")
        whole = products(self.run(self.device, "float32", node))
        for stop in (1, 4, 8):
            assert products(self.run(self.device, "float32", node, stop)) == whole, stop


def _break_off(call: Any, stop: int) -> None:
    calls, originals = [], {}
    for name in ("_score", "_said", "_generate"):
        originals[name] = original = getattr(MaskedLM, name)

        def wrapped(self: Any, *arguments: Any, original: Any = original) -> Any:
            if len(calls) == stop:
                raise Interrupted
            calls.append(original)
            return original(self, *arguments)

        setattr(MaskedLM, name, wrapped)
    try:
        call()
    except Interrupted:
        return
    finally:
        for name, original in originals.items():
            setattr(MaskedLM, name, original)
    raise AssertionError(f"there were no {stop} batches")


def _off(wanted: Path, found: Path) -> np.ndarray:
    """How far the nats of a predicted token lie apart, of each document that has some."""
    there = tests.rows(found)
    return np.array(
        [
            abs(one["nats"] - other["nats"]) / one["predicted"]
            for task, own in tests.rows(wanted).items()
            for one, other in zip(own, there[task], strict=True)
            if one["predicted"]
        ]
    )


def _shares(folder: Path, task: str) -> np.ndarray:
    """Induced sparsity of a task by tensor and layer."""
    own = json.loads((folder / "eval.json").read_text())["tasks"][task]["sparsity"]
    return np.array([share for one in own.values() for share in one["layers"]], dtype=float)


def _kept(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Share of the entries that are kept, of each step, slot and region."""
    names = ("step", "tensor", "layer", "region")
    return {
        tuple(row[name] for name in names): row["kept"] / row["entries"]
        for row in rows
        if row["entries"]
    }


def main() -> None:
    """Run them, and say what fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="those with this in their name")
    arguments = parser.parse_args()
    failed = 0
    for kind in MODELS:
        bench = Bench(kind, arguments.device)
        checks: dict[str, Any] = {f"{kind} resumed": bench.resumed}
        for dtype in SHARES:
            for site in (None, *(SITES if kind == "llama" else FEW)):
                checks[f"{kind} {site} {dtype}"] = lambda b=bench, s=site, d=dtype: b.node(s, d)
        failed += failures(checks, arguments.only)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
