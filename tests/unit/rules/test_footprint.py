"""What jobs ask of a scheduler, and how the questions and answers get to Snakemake."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_results import write_model
from sparsity_atlas.config.grid import Curve
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.config.selection import fold, unfold
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.models.memory import Largest
from sparsity_atlas.rules import asks, before_manifest, beside_gpu, footprint
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.rules.footprint import Needs
from sparsity_atlas.rules.question import question


def config(model: dict[str, Any] | None = None, **changes: Any) -> Config:
    return parse(
        {
            "models": {"m": model or {"hub": "some/model"}},
            "criteria": {"topp": None},
            "texts": {"prose": {"hub": "some/text"}},
            "tasks": {"arc_easy": None},
            "run": [{"models": ["m"], "levels": [0.9, 0.5]}],
            **changes,
        }
    )


def with_manifest(results: Path) -> None:
    """Of a model of 8 billion parameters."""
    write_model(results / "m", parameters=4 * 10**9, hidden=4096, width=14336)


def host(own: Needs, stage: str = "evaluate", site: str | None = "input") -> int:
    """Of the model, beside what each stage's process has without one."""
    process = beside_gpu.PROCESS_MIB if own.gpu_memory(stage, "m", site) else footprint.BASE_MIB
    return own.host(stage, "m", site) - process[stage]


@pytest.mark.parametrize(
    ("device", "dtype", "item"),
    [("cuda", "auto", 2), ("cuda", "float32", 4), ("cuda", "bfloat16", 2), ("cpu", "auto", 4)],
)
def test_a_model_is_mapped_while_it_is_read(
    tmp_path: Path, device: str, dtype: str, item: int
) -> None:
    with_manifest(tmp_path)  # whose files hold bfloat16
    own = Needs(config({"hub": "x/y", "dtype": dtype}, device=device), str(tmp_path))
    assert host(own, "output_error") == 8 * 10**9 * (item + 2) // 2**20


def test_a_file_of_four_bits_a_number_is_no_guess(tmp_path: Path) -> None:
    """Before its manifest is there: 98 MB of 135 million numbers, in float32 and once more while copied."""
    with (tmp_path / "m.gguf").open("wb") as file:
        file.truncate(98_000_000)
    for entry in ({"gguf": str(tmp_path / "m.gguf")}, {"path": str(tmp_path), "gguf": "m.gguf"}):
        expected = host(Needs(config(entry, device="cpu"), str(tmp_path)), "models", None)
        assert 2 * 4 * 135_000_000 / 2**20 < expected < 3000
    missing = Needs(config({"gguf": "nowhere.gguf"}, device="cpu"), str(tmp_path))
    assert host(missing, "models", None) == before_manifest.UNKNOWN_WEIGHTS_MIB


def test_what_is_asked_for_is_more_than_what_is_expected(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    own = Needs(config(device="cpu"), str(tmp_path))
    expected = own.host("evaluate", "m", "input")
    assert own.memory("evaluate", "m", "input") == round(1.25 * expected) + 500
    assert own.gpu_memory("evaluate", "m", "input") == 0


def largest(**numbers: int) -> dict[str, int]:
    empty = {"tokens": 0, "longest": 0, "scored": 0, "pairs": 0, "kept": 0}
    return {**empty, **numbers}


def evaluated(results: Path, **tasks: dict[str, int]) -> None:
    """A dense baseline with the largest batches of some tasks."""
    found = {
        name: {"status": "ok", "tokens": {"scoring": 1}, "largest": one}
        for name, one in tasks.items()
    }
    failed = {"failed": {"status": "failed", "reason": "NaN"}}
    write_manifest(results / "m/dense/eval.json", {"tasks": {**found, **failed}})


def test_the_largest_batch_counts_with_the_vocabulary(tmp_path: Path) -> None:
    wide = {"vocabulary": 262_144, "pieces": True, "heads": 0, "cache": 0}
    sizes = {"parameters": 10**6, "hidden": 1024, "width": 4096, "layers": 10}
    write_model(tmp_path / "m", **sizes, memory=wide)
    weights = 2 * 10**6 * 4
    entry = {"hub": "x/y", "batch_size": 8, "max_length": 1024}
    own = Needs(config(entry, device="cpu"), str(tmp_path))
    assert own.largest("m") == Largest(8192, 1024, 8192, 8192 * 1024)
    before = host(own)
    evaluated(
        tmp_path,
        a=largest(tokens=1000, longest=100, scored=2000, pairs=50),
        b=largest(tokens=4000, longest=10, scored=2000),
    )
    own = Needs(config(entry, device="cpu"), str(tmp_path))
    assert own.largest("m") == Largest(4000, 100, 2000, 50)
    # At the head: a piece and a chunk of it, hidden states and those that are shown, sums of zeros.
    logits = 4 * 2**25 + 4 * 2**21
    hidden = (2 * 4000 + 2000) * 1024 * 4
    sums = 4000 * 10 * 48
    layer = 4000 * ((6 * 1024 + 5 * 4096) * 4 + 10 * 9) + 50 * 6
    expected = (weights + max(logits + hidden + sums, layer)) // 2**20
    assert host(own) == expected < before
    # All logits of a batch at once, where the head cannot be shown a few tokens.
    write_model(tmp_path / "m", **sizes, memory={**wide, "pieces": False})
    own = Needs(config(entry, device="cpu"), str(tmp_path))
    assert host(own) > 4000 * 262_144 * 4 // 2**20


def test_results_of_an_earlier_version_are_no_error(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    task = {"status": "ok", "tokens": {"scoring": 1}}
    write_manifest(tmp_path / "m/dense/eval.json", {"tasks": {"a": task}})
    own = Needs(config(device="cpu"), str(tmp_path))
    assert own.largest("m") == Largest(16 * 2048, 2048, 16 * 2048, 16 * 2048**2)
    write_manifest(tmp_path / "m/model.json", {"name": "m", "parameters": {"loaded": 1}})
    assert Needs(config(device="cpu"), str(tmp_path)).sizes("m") is None


def test_gpu_memory_is_weights_and_the_work(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    evaluated(tmp_path, a=largest(tokens=10**6, longest=1000, scored=1))
    own = Needs(config(device="cuda"), str(tmp_path))
    work = 10**6 * ((4 * 4096 + 3 * 14336) * 2 + 3 * 9)
    # A context, weights and a pass, and of passes of other shapes what the allocator keeps at most.
    expected = 700 + 1.25 * (8 * 10**9 * 2 + work) / 2**20 + 1000
    assert own.gpu_memory("evaluate", "m", "input") == round(expected)
    evaluated(tmp_path, a=largest(tokens=10**2, longest=1000, scored=1))
    few = Needs(config(device="cuda"), str(tmp_path)).gpu_memory("evaluate", "m", "input")
    assert few == pytest.approx(700 + (1.25 * 16 * 10**9 + 3.25 * work / 10**4) / 2**20, abs=1)
    assert host(own) == 8 * 10**9 * 4 // 2**20


def test_memory_before_there_is_a_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(3 * 2**20))
    assert host(Needs(config({"path": str(folder)}), str(tmp_path)), "models") == 9
    (folder / "config.json").write_text('{"vocab_size": 262144}')
    # The files are mapped no more when the proof has its logits.
    assert host(Needs(config({"path": str(folder)}), str(tmp_path)), "models") == 6 + 384
    assert host(Needs(config(), str(tmp_path)), "models") == 32000


def test_a_manifest_that_appears_is_seen_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(footprint.time, "monotonic", lambda: clock[0])
    own = Needs(config(device="cuda"), str(tmp_path))
    assert own.sizes("m") is None
    with_manifest(tmp_path)
    assert own.sizes("m") is None
    clock[0] += 2
    assert own.sizes("m") is not None


def test_minutes_come_from_the_tokens_of_the_dense_baseline(tmp_path: Path) -> None:
    own = Needs(config(device="cuda"), str(tmp_path))
    assert own.evaluation_minutes("m", 9) == 9 * 240
    with_manifest(tmp_path)
    tasks = {
        "a": {
            "status": "ok",
            "largest": largest(),
            "tokens": {"scoring": 2_000_000, "generation": 1_000_000},
        },
        "b": {"status": "failed", "reason": "NaN"},
    }
    write_manifest(tmp_path / "m/dense/eval.json", {"tasks": tasks})
    own = Needs(config(device="cuda"), str(tmp_path))
    # 2 FLOP a parameter and token, at 10 TFLOP a second.
    assert own.evaluation_minutes("m") == 30 + round(3e6 * 2 * 8e9 / 1e13 / 60)
    assert own.evaluation_minutes("m", 9) == 30 + round(9 * 3e6 * 2 * 8e9 / 1e13 / 60)


def test_a_mixture_takes_memory_for_all_experts_and_time_for_those_that_are_met(
    tmp_path: Path,
) -> None:
    memory = {"vocabulary": 1000, "pieces": True, "heads": 0, "cache": 384}
    found = []
    for name, active, routed in (("dense", 0, {}), ("mixture", 10**9, {"routed": 8})):
        folder = tmp_path / name
        write_model(folder / "m", 8 * 10**9, active=active, memory=memory | routed)
        evaluated(folder, a={**largest(tokens=10**4, longest=100, scored=1)})
        found.append(Needs(config(device="cuda"), str(folder)))
    dense, mixture = found
    assert mixture.capture_minutes("m", 10**6) - 30 == pytest.approx(
        (dense.capture_minutes("m", 10**6) - 30) / 8, abs=1
    )
    assert host(mixture) == host(dense)
    # Each of the eight experts has what it gets and makes of a token.
    more = mixture.gpu_memory("evaluate", "m", "input") - dense.gpu_memory("evaluate", "m", "input")
    # The allocator keeps two passes more.
    assert more == pytest.approx(3.25 * 10**4 * 8 * 4 * 64 * 2 / 2**20, abs=1)


def test_vectors_are_counted_in_each_part_of_each_layer(tmp_path: Path) -> None:
    """A dense layer, and one with a shared expert and routed ones; attention's count once a layer."""
    parts = [{"layer": 0}, {"layer": 1, "part": "shared"}, {"layer": 1, "part": "experts"}]
    write_model(tmp_path / "m", layers=2, ffn=parts)
    own = Needs(config(), str(tmp_path))
    sizes = own.sizes("m")
    assert sizes is not None
    counts = {
        site: own._slots("m", sizes, site) for site in ("input", "all_inputs", "o_input", None)
    }
    assert counts == {"input": 3, "all_inputs": 6, "o_input": 2, None: 2 * 2 + 3 * 4}
    assert own._slots("m", sizes, "input@experts") == 1
    assert own._slots("m", sizes, "intermediate@shared+experts") == 2


def test_an_evolution_asks_for_its_passes(tmp_path: Path) -> None:
    write_model(tmp_path / "m", parameters=10**6, hidden=64, width=256)
    evolved = {"evolved": {"rule": "teal", "allocation": "evolutionary"}}
    with_evolution = config(device="cpu", criteria={"topp": {}, **evolved})
    plain, own = (Needs(one, str(tmp_path)) for one in (config(device="cpu"), with_evolution))
    asked = [
        own.calibration_minutes("m", allocation, 1)
        for allocation in ("uniform", "sensitivity", "evolutionary")
    ]
    assert asked == sorted(asked)
    assert asked[0] == plain.capture_minutes("m") < asked[2]
    sizes = own.sizes("m")
    assert sizes is not None
    kept = 1024 * sizes.vocabulary * 4 // 2**20
    assert host(own, "calibrate", "input") - host(plain, "calibrate", "input") >= kept > 0
    ask = Asks(with_evolution, str(tmp_path))
    node = SimpleNamespace(model="m", criterion="evolved", site="input")
    assert ask.calibration_minutes(node, attempt=2) == 2 * asked[2]


def test_each_attempt_asks_for_more(tmp_path: Path) -> None:
    with_manifest(tmp_path)
    ask = Asks(config(device="cuda"), str(tmp_path))
    node = SimpleNamespace(model="m", criterion="topp", site="input", level="0.9")
    assert inspect.signature(ask.memory("evaluate")).parameters.keys() == {"wildcards", "attempt"}
    for question_ in (
        ask.memory("evaluate"),
        ask.gpu_memory("evaluate"),
        ask.node_minutes,
        ask.search_minutes,
        ask.error_minutes,
        ask.calibration_minutes,
    ):
        once = question_(node, attempt=1)
        assert [question_(node, attempt=n) for n in (2, 3)] == [2 * once, 3 * once]


@pytest.mark.parametrize(("visible", "threads"), [("", 1), ("0,1", 4)])
def test_a_capture_from_a_gpu_has_threads_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, threads: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("sparsity_atlas.rules.resources.inside_allocation", lambda: False)
    ask = Asks(config(), str(tmp_path))
    assert ask.capture_threads(SimpleNamespace(model="m")) == threads
    # A job of a cluster must not take more than it was given.
    monkeypatch.setattr("sparsity_atlas.rules.resources.inside_allocation", lambda: True)
    assert Asks(config(), str(tmp_path)).capture_threads(SimpleNamespace(model="m")) == 1


@pytest.mark.parametrize(
    ("visible", "cores", "shares", "threads"),
    [("", 16, 1, 1), ("0", 16, 1, 8), ("0", 3, 1, 3), ("0,1", 16, 4, 2), ("0", 1, 13, 1)],
)
def test_a_dense_baseline_on_a_gpu_has_threads_to_build_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    cores: int,
    shares: int,
    threads: int,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("SPARSITY_ATLAS_GPU_SHARES", str(shares))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("sparsity_atlas.rules.resources.inside_allocation", lambda: False)
    assert Asks(config(), str(tmp_path)).dense_threads(SimpleNamespace(model="m")) == threads
    monkeypatch.setattr("sparsity_atlas.rules.resources.inside_allocation", lambda: True)
    assert Asks(config(), str(tmp_path)).dense_threads(SimpleNamespace(model="m")) == 1


def test_what_all_levels_share_is_worked_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each took milliseconds and up: for 50,000 jobs, minutes, at every look for jobs to start."""
    calls: Counter[str] = Counter()

    def counted(name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return answer(*arguments)

        return call

    monkeypatch.setattr(asks, "task_content", counted("tasks", asks.task_content))
    for name in ("evaluation_slice", "criterion_slice", "curves"):
        monkeypatch.setattr(asks.grid, name, counted(name, getattr(asks.grid, name)))
    ask = Asks(config(), str(tmp_path))
    calls.clear()
    code = ask.criterion_code("evaluate")
    for level in range(100):
        node = SimpleNamespace(model="m", criterion="topp", site="input", level=f"0.{level}")
        for answer in (ask.node_tasks, ask.node_settings, ask.criterion, code, ask.search_of_node):
            answer(node)
    assert calls == {"tasks": 1, "evaluation_slice": 1, "criterion_slice": 1}


def test_a_question_looks_like_a_bound_method() -> None:
    class Plain:
        def answer(self, wildcards: str, attempt: int) -> str:
            return f"{wildcards}{attempt}{self.word}"

        def __init__(self, word: str) -> None:
            self.word = word

    class Asked(Plain):
        answer = question(Plain.answer)

    first, second = Asked("a"), Asked("b")
    assert inspect.signature(first.answer) == inspect.signature(Plain("a").answer)
    assert (first.answer("w", attempt=2), second.answer("w", attempt=1)) == ("w2a", "w1b")
    assert first.answer is first.answer


names = st.sampled_from("abc")


@given(st.lists(st.tuples(names, names, names), unique=True))
def test_curves_come_back_in_their_order(keys: list[tuple[str, str, str]]) -> None:
    curves = [Curve(*key, auto=True, levels=(), tasks=()) for key in keys]
    assert list(unfold(fold(curves))) == keys


def test_a_grid_of_fifty_thousand_curves_fits_into_one_argument() -> None:
    sites = ("input", "up", "gate", "intermediate", "all_inputs")
    keys = [(f"model-{m}", f"c{c}", site) for m in range(1250) for c in range(8) for site in sites]
    assert len(keys) == 50_000
    curves = [Curve(*key, auto=True, levels=(), tasks=()) for key in keys]
    assert len(fold(curves)) < 2**17
