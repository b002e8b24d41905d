"""Where the seconds of a node go beside its forward passes, by phase, on a suite of the paper's sizes.

    python benchmarks/host.py                                            # a tenth of the suite, on the CPU
    python benchmarks/host.py --scale 1 --shape 270m --device cuda --dtype bfloat16 --batch-size 64

One process does what the stages `dense` and `search` do with a model: it opens a session, runs the dense
baseline and some levels, and makes their curve; then a second model with the same tokenizer. Then the
forward passes of each node are run by themselves, with the same inputs on the device already, hooks
attached and nothing read until the last of them. Everything is given in multiples of these. Whether other
processes build requests beside is for the environment to say (SPARSITY_ATLAS_BUILDERS; see
`sparsity_atlas.evaluation.ahead`); their time shows only where the session waits for them.

On a CPU the process's own time is taken, with one thread; on a GPU the clock's, so that the phase in which
the host waits for the device is named as well (`transfers`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measure import machine
from suite import SHAPES, save_model, write_tasks

SITE = "intermediate"


class Phases:
    """Seconds of named phases; what one calls of another counts for that other alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count a function or a method from now on."""
        work = getattr(owner, name)

        @functools.wraps(work)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.during(phase):
                return work(*arguments, **options)

        setattr(owner, name, counted)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count a block."""
        now = self.clock()
        if self._open:
            outer, since = self._open[-1]
            self.seconds[outer] += now - since
        self._open.append((phase, now))
        try:
            yield
        finally:
            now = self.clock()
            self.seconds[phase] += now - self._open.pop()[1]
            if self._open:
                self._open[-1] = (self._open[-1][0], now)

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def name_phases(phases: Phases) -> None:
    """Say which functions of the package are which phase."""
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    from sparsity_atlas.evaluation import evaluate, kept, search, session
    from sparsity_atlas.evaluation.ahead import Ahead
    from sparsity_atlas.evaluation.samples import SampleTable
    from sparsity_atlas.files.journal import Journal
    from sparsity_atlas.lm import forward
    from sparsity_atlas.lm.model import AtlasLM
    from sparsity_atlas.lm.usage import Usage
    from sparsity_atlas.models import manifest
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.tasks import load, prepared, request_cache

    places = {
        "model loading": [(session, "load"), (session, "load_tokenizer"), (manifest, "load")],
        "task loading": [(load, "load_tasks")],
        "hashing": [
            *((load, "leaf_identity"), (evaluate, "digest"), (session, "from_manifest")),
            *((prepared, "_hash"), (request_cache, "key")),
        ],
        "request building": [
            *((prepared, "prepare"), (ConfigurableTask, "build_all_requests")),
            *((AtlasLM, "encode"), (AtlasLM, "work")),
            *((request_cache, "read"), (request_cache, "write")),
        ],
        "starting and waiting for builders": [
            *((Ahead, "wait"), (Ahead, "begin"), (Ahead, "first_of")),
        ],
        "proof of sharing": [(AtlasLM, "_abilities")],
        "lm-eval's scoring": [(evaluator, "evaluate")],
        "inputs and counts": [
            *((AtlasLM, "_answers"), (Usage, "add_scored"), (Usage, "__init__")),
        ],
        "log-probabilities": [(forward, "scores")],
        "zeros by document": [(forward, "zeros_by_document"), (Counter, "take_unseen")],
        # On a GPU: the host's time to launch them.
        "forward passes": [(AtlasLM, "_model_call")],
        "journal": [(Journal, "append"), (Journal, "__init__"), (Journal, "close")],
        "sample rows": [(evaluate, "sample_rows"), (evaluate, "task_result")],
        "Parquet": [(SampleTable, "write"), (kept, "read_samples")],
        "manifests": [(evaluate, "write_manifest"), (evaluate, "check_measured")],
        "scores of a search": [(search, "read_scores")],
    }
    if torch.cuda.is_available():
        # These wait for what the device has not done yet.
        places["transfers"] = [
            (torch.Tensor, "to"),
            (torch.Tensor, "cpu"),
            (torch.Tensor, "tolist"),
            (torch.cuda.Event, "synchronize"),
        ]
    for phase, functions in places.items():
        for owner, name in functions:
            phases.wrap(owner, name, phase)


def alone(session: Any, node: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a node's forward passes, heads over the scored tokens included, with nothing beside them.

    And those of them until the host had begun all; little is left then for a GPU that waits for the host.
    """
    from sparsity_atlas.lm import forward

    lm = session.lm
    scored: list[torch.Tensor] = []  # of the pass that is run

    def shown(_: Any, arguments: tuple) -> tuple:
        (hidden,) = arguments
        return (hidden.reshape(-1, hidden.shape[-1])[scored[-1]][None],)

    total = begun = 0.0
    handle = lm.model.get_output_embeddings().register_forward_pre_hook(shown)
    for name in session.tasks:
        work = session.prepared(name).work
        passes = []
        for batch in (batch for batches in work.batches.values() for batch in batches):
            where = torch.from_numpy(batch.scored).to(lm.device)
            valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
            valid = torch.from_numpy(valid).to(lm.device)
            passes.append((*forward.inputs(lm.model, batch, work.abilities.masks), where, valid))
        with torch.no_grad(), session.attach(node) as counter:
            _wait(lm.device)
            began = clock()
            for ids, options, where, valid in passes:
                scored[:] = [where]
                counter.expect(valid)  # what nobody announces is not counted
                lm.model(ids, **options)
            begun += clock() - began
            _wait(lm.device)
            total += clock() - began
    handle.remove()
    return total, begun


def launching(session: Any, node: Any, clock: Callable[[], float]) -> float:
    """Seconds of as many passes as a node has, over next to no tokens: the host's own time to begin them."""
    works = [session.prepared(name).work for name in session.tasks]
    count = sum(len(batches) for work in works for batches in work.batches.values())
    ids = torch.zeros(2, 8, dtype=torch.long, device=session.lm.device)
    valid = torch.ones(2, 8, dtype=torch.bool, device=session.lm.device)
    with torch.no_grad(), session.attach(node) as counter:
        for _ in range(3):
            counter.expect(valid)
            session.lm.model(ids)
        _wait(session.lm.device)
        began = clock()
        for _ in range(count):
            counter.expect(valid)
            session.lm.model(ids)
        _wait(session.lm.device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm(session: Any, nodes: list[Any]) -> None:
    """Have kernels compiled, which is kept: once a machine, and no part of what is measured."""
    from sparsity_atlas.models.logits.likelihoods import likelihoods

    for node in nodes:
        with torch.no_grad(), session.attach(node):
            ids = torch.zeros(2, 8, dtype=torch.long, device=session.lm.device)
            found = session.lm.model(ids).logits
            likelihoods([found[0]], np.arange(8), np.zeros(8, dtype=np.int64))


def report(title: str, phases: dict[str, float], both: tuple[float, float] | None) -> None:
    """Print where a part's seconds went."""
    total = sum(phases.values())
    ratio, passes = "", 0.0
    if both:
        passes, begun = both
        ratio = (
            f", {total / passes:.2f} times its passes alone ({passes:.2f} s, {begun:.2f} to begin)"
        )
    print(f"{title}: {total:.2f} s{ratio}", flush=True)
    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        if seconds >= 0.005 * total:
            share = f"{seconds / passes:8.3f}" if passes else ""
            print(f"    {name:<24} {seconds:8.2f} s {share}", flush=True)


def report_sizes(works: list[Any]) -> None:
    """Print what the tasks come to."""
    batches = [one for work in works for some in work.batches.values() for one in some]
    asked = sum(int((one.run * one.counted).sum()) for one in batches)
    run = sum(int(one.lengths.sum()) for one in batches)
    padded = sum(one.tokens.size for one in batches)
    print(
        f"{sum(len(work.documents) for work in works):,} documents, {asked:,} tokens as lm-eval "
        f"runs them, {run:,} run, {padded:,} with padding, in {len(batches):,} batches",
        flush=True,
    )


def settings_of(arguments: argparse.Namespace, tasks: dict[str, Any]) -> dict[str, Any]:
    """As `grid.evaluation_slice` gives them."""
    return {
        **{"tasks": tasks, "seed": 1234, "device": arguments.device, "dtype": arguments.dtype},
        **{"batch_size": arguments.batch_size, "max_length": None, "add_bos_token": None},
    }


def make_curve(folder: Path, levels: list[str]) -> None:
    """The stage `curve` on the levels below a folder."""
    from sparsity_atlas.curves import curve

    dense = curve.NodeSamples(folder / "dense", SITE)
    nodes = {level: curve.NodeSamples(folder / level, SITE) for level in levels}
    tasks = {name: {} for name in dense.manifest["tasks"]}
    settings = {"tasks": tasks, "bars": [0.99], "replicates": 10_000, "seed": 1234}
    samples = curve.all_samples(dense, nodes, settings)
    estimates = curve.estimate_all(samples, settings["replicates"], settings["seed"])
    content = curve.build(dense, nodes, samples, estimates, settings, SITE)
    assert np.isfinite(content["points"][0]["value"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.1, help="share of the documents")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--vocabulary", type=int, default=32_768, help="tokens; Gemma's are 262,144"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--models", type=int, default=2, help="of the same tokenizer")
    parser.add_argument("--levels", default="0.9,0.7", help="comma-separated")
    parser.add_argument(
        "--late", action="store_true", help="begin no task before the one in front of it has ended"
    )
    parser.add_argument("--keep", type=Path, help="folder for the results, to be looked at")
    parser.add_argument("--profile", help="also write cProfile's records of each part here")
    arguments = parser.parse_args()

    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="benchmark-"))
    # Requests are built here and now, whatever an earlier run left.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["HF_HOME"] = str(folder / "cache" / "huggingface")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    clock = time.perf_counter if arguments.device == "cuda" else time.process_time
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    tasks = write_tasks(folder / "tasks", arguments.scale)
    phases = Phases(clock)
    levels = arguments.levels.split(",")

    from sparsity_atlas.evaluation.damage import read_scores
    from sparsity_atlas.evaluation.evaluate import evaluate_node
    from sparsity_atlas.evaluation.node import Node
    from sparsity_atlas.evaluation.session import Session
    from sparsity_atlas.files.whole import read_manifest, write_manifest
    from sparsity_atlas.lm.model import AtlasLM
    from sparsity_atlas.loading.checkpoint import Checkpoint
    from sparsity_atlas.models.manifest import describe
    from sparsity_atlas.tasks.score import choose_metric

    manifests = []
    for seed in range(arguments.models):
        checkpoint = Checkpoint(
            save_model(
                folder / f"model-{seed}",
                arguments.shape,
                arguments.vocabulary,
                seed,
                arguments.dtype,
                arguments.device,
            )
        )
        manifests.append(folder / f"{seed}/model.json")
        write_manifest(
            manifests[-1],
            {
                **{"name": f"model-{seed}", "source": {"path": str(checkpoint.folder)}},
                **{"revision": None, "digest": checkpoint.digest()},
                **describe(checkpoint, None),
            },
        )
    if arguments.late:
        AtlasLM._begin_following = lambda _: None
    name_phases(phases)
    settings = settings_of(arguments, tasks)
    print(
        f"{machine(arguments.device)}; {arguments.shape}, vocabulary {arguments.vocabulary:,}, "
        f"{arguments.dtype}, batch size {arguments.batch_size}, scale {arguments.scale:g}",
        flush=True,
    )
    nodes = {"dense": None} | {level: Node.make({"rule": "topp"}, SITE, level) for level in levels}
    warm(Session.open(manifests[0], {**settings, "tasks": {}}, "benchmark"), list(nodes.values()))
    phases.take()
    for seed, manifest in enumerate(manifests):
        with part(phases, arguments.profile, f"start-{seed}"):
            session = Session.open(manifest, settings, "benchmark")
        started = phases.take()
        report(f"model {seed}: start", started, None)
        place = manifest.parent
        for name, node in nodes.items():
            with part(phases, arguments.profile, f"{name}-{seed}"):
                evaluate_node(session, node, place / name)
                if node is not None:
                    results = read_manifest(place / "dense/eval.json")["tasks"]
                    metrics = {task: choose_metric(task, None, results[task]) for task in tasks}
                    read_scores(place / name, metrics)
            took = phases.take()
            if node is None:
                report_sizes([session.prepared(task).work for task in tasks])
            passes = alone(session, node, clock)
            report(f"model {seed}: {name}", took, passes)
            launched = launching(session, node, clock)
            print(f"    as many passes over 16 tokens: {launched:.2f} s, the host's own")
            if node is None:
                both = sum(started.values()) + sum(took.values())
                print(f"    start and dense: {both:.2f} s, {both / passes[0]:.2f} times these")
            phases.take()
        if not seed:
            with part(phases, arguments.profile, "curve"), phases.during("bootstrap and curve"):
                make_curve(place, levels)
            report("curve", phases.take(), None)


@contextlib.contextmanager
def part(phases: Phases, profile: str | None, name: str) -> Iterator[None]:
    """Count what is named nowhere as well, and profile it if that is asked for."""
    import cProfile

    profiler = cProfile.Profile() if profile else None
    if profiler:
        profiler.enable()
    with phases.during("all else"):
        yield
    if profiler:
        profiler.disable()
        Path(profile).mkdir(parents=True, exist_ok=True)
        profiler.dump_stats(Path(profile, f"{name}.prof"))


if __name__ == "__main__":
    main()
