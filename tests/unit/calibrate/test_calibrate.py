"""The calibration stage: what it finds in the store, what depends on it, what is refused."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_parts import by_tensor
from sparsity_atlas.activations import capture
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.activations.texts import documents
from sparsity_atlas.calibrate import calibrate, export
from sparsity_atlas.config.schema import parse
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.calibration_file import (
    Calibration,
    check_disjoint,
    read_calibration,
    write_calibration,
)
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.evaluation import search
from sparsity_atlas.evaluation import session as sessions
from sparsity_atlas.evaluation.evaluate import evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.files.whole import file_digest, read_manifest, write_manifest
from sparsity_atlas.plan.model_facts import Unknowns
from sparsity_atlas.plan.targets import missed_targets
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.rules.inputs import check_inputs
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.studies import output_error
from tiny_lm import (
    ROLLING,
    open_session,
    rolling_documents,
    run_stage,
    sentences,
    settings,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LENGTH, SEEN = 160, 16, 96


class Work(NamedTuple):
    """A model with captured activations."""

    manifest: Path
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "activations.zarr"


@pytest.fixture(scope="module")
def work(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Activations of all sites for ten sequences."""
    folder = tmp_path_factory.mktemp("calibrate")
    text = folder / "text.jsonl"
    lines = sentences(60, seed=3, shortest=12, longest=20)
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    loading = {
        **{"dtype": "auto", "device": "cpu", "text": {"file": str(text)}},
        **{"tokens": TOKENS, "sequence_length": LENGTH, "batch_size": 4, "add_bos_token": None},
    }
    for site in ("all_inputs", "gate", "up", "intermediate", "input"):
        run_stage(
            capture,
            {
                **{"--model": manifest, "--site": site, "--siblings": "gate,up"},
                **{"--settings": json.dumps(loading), "--store": folder / "activations.zarr"},
                "--output": folder / "capture" / f"{site}.json",
            },
        )
    return Work(manifest, folder)


def calibrated(work: Work, output: Path, rule: str, site: str, **changes: Any) -> Calibration:
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": changes.get("tokens", SEEN)}
    run_stage(
        calibrate,
        {
            **{"--model": work.manifest, "--capture": work.folder / "capture" / f"{site}.json"},
            **{"--store": work.store, "--criterion": json.dumps({"rule": rule})},
            **{"--site": site, "--settings": json.dumps(loading), "--output": output},
            "--code": changes.get("code", "test"),
        },
    )
    return read_calibration(output)


def test_it_sees_the_first_tokens_of_each_layer(work: Work, tmp_path: Path) -> None:
    found = calibrated(work, tmp_path / "c.safetensors", "teal", "all_inputs")
    store = ActivationStore(work.store)
    assert set(found.states) == {f"{t}.{n}" for t in ("input", "intermediate") for n in (0, 1)}
    for name, state in found.states.items():
        tensor, _, layer = name.partition(".")
        ranked = np.sort(np.abs(store.read(tensor, int(layer), 0, SEEN)).ravel())
        assert float(state["table"][5000]) == ranked[len(ranked) // 2]
    assert found.about["tokens"] == SEEN


def test_other_tensors_follow_from_the_input(work: Work, tmp_path: Path) -> None:
    """CHESS needs u beside g, which it is calibrated at."""
    found = calibrated(work, tmp_path / "c.safetensors", "chess", "gate")
    store = ActivationStore(work.store)
    for layer in (0, 1):
        u = torch.from_numpy(store.read("up", layer, 0, SEEN))
        state = found.states[f"gate.{layer}"]
        torch.testing.assert_close(state["rms"], u.square().mean(0).sqrt())


def test_the_same_bytes_again(work: Work, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    digests = [calibrated(work, path, "cett", "intermediate").digest for path in paths]
    assert digests[0] == digests[1]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for change in ({"code": "other"}, {"tokens": 80}):
        other = calibrated(work, tmp_path / "c.safetensors", "cett", "intermediate", **change)
        assert other.digest != digests[0]


@pytest.mark.parametrize("tokens", [0, TOKENS, 2 * TOKENS])
def test_tokens_must_be_left_over(work: Work, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(AtlasError, match=rf"calibration.tokens: {tokens} found, expected 1 to 159"):
        calibrated(work, tmp_path / "c.safetensors", "teal", "input", tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_a_rule_without_calibration(work: Work, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="criteria: TopK has nothing to calibrate"):
        calibrated(work, tmp_path / "c.safetensors", "topk", "input")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_calibration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(AtlasError, match="no such file; run its calibration first"):
        read_calibration(path)
    path.write_bytes(content)
    with pytest.raises(AtlasError, match="damaged calibration"):
        read_calibration(path)


def test_a_calibration_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"input.0/table": torch.zeros(1)}, path, {"about": json.dumps({"tokens": 1})})
    with pytest.raises(AtlasError, match="a calibration of another version of this program"):
        read_calibration(path)


# What depends on it


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    return {"pages": write_task(tmp_path / "tasks", "pages", rolling_documents(), **ROLLING)}


def node(work: Work, path: Path, rule: str, site: str, level: str, **changes: Any) -> Node:
    return Node.make({"rule": rule}, site, level, calibrated(work, path, rule, site, **changes))


def test_a_node_is_sparsified_by_its_calibration(
    work: Work, tmp_path: Path, tasks: dict[str, Any]
) -> None:
    made = node(work, tmp_path / "c.safetensors", "teal", "all_inputs", "0.5")
    result = evaluate_node(open_session(work.manifest, tasks), made, tmp_path / "node")
    for tensor in ("input", "intermediate"):
        # Word salad of the same words: the thresholds carry over.
        assert result["tasks"]["pages"]["sparsity"][tensor]["total"] == pytest.approx(0.5, abs=0.05)
    assert result["calibration"]["tokens"] == SEEN
    assert result["calibration"]["digest"] == made.calibration.digest


def test_level_0_is_the_dense_model(work: Work, tmp_path: Path, tasks: dict[str, Any]) -> None:
    session = open_session(work.manifest, tasks)
    dense = evaluate_node(session, None, tmp_path / "dense")["tasks"]["pages"]["scores"]
    for rule, site in (("r_sparse", "input"), ("shifted_relu", "gate"), ("cett", "intermediate")):
        made = node(work, tmp_path / "c.safetensors", rule, site, "0")
        result = evaluate_node(session, made, tmp_path / rule)
        assert result["tasks"]["pages"]["scores"] == dense


def test_another_calibration_is_another_node(
    work: Work, tmp_path: Path, tasks: dict[str, Any]
) -> None:
    session = open_session(work.manifest, tasks)
    found = []
    for tokens in (96, 80, 96):
        made = node(work, tmp_path / "c.safetensors", "teal", "input", "0.5", tokens=tokens)
        found.append(evaluate_node(session, made, tmp_path / "node"))
    assert found[0] == found[2]
    assert found[0]["fingerprints"] != found[1]["fingerprints"]
    assert found[0]["tasks"] != found[1]["tasks"]


def test_a_node_without_its_calibration() -> None:
    with pytest.raises(AtlasError, match="criteria: Teal needs a calibration; found none"):
        Node.make({"rule": "teal"}, "input", "0.5")


def test_output_errors_leave_the_calibration_s_tokens_out(work: Work, tmp_path: Path) -> None:
    store = ActivationStore(work.store)
    found = calibrated(work, tmp_path / "c.safetensors", "quantile", "intermediate")
    output = tmp_path / "sparsity.parquet"
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": SEEN}
    run_stage(
        output_error,
        {
            **{"--model": work.manifest, "--site": "intermediate", "--store": work.store},
            **{"--criterion": json.dumps({"rule": "quantile"}), "--levels": "0.3"},
            **{"--settings": json.dumps(loading), "--output": output},
            "--calibration": tmp_path / "c.safetensors",
        },
    )
    for row in pq.read_table(output).to_pylist():
        layer = row["layer"]
        threshold = float(found.states[f"intermediate.{layer}"]["table"][3000])
        i = store.read("intermediate", layer, SEEN)
        assert row["sparsity"] == pytest.approx((np.abs(i) < threshold).mean(), abs=1e-3)


def test_a_search_uses_it(work: Work, tmp_path: Path, tasks: dict[str, Any]) -> None:
    session = open_session(work.manifest, tasks)
    evaluate_node(session, None, tmp_path / "dense")
    path = tmp_path / "cett" / "calibration.safetensors"
    made = calibrated(work, path, "cett", "intermediate")
    run_stage(
        search,
        {
            **{"--model": work.manifest, "--dense": tmp_path / "dense" / "eval.json"},
            **{"--settings": json.dumps(settings(tasks)), "--site": "intermediate"},
            **{"--criterion": json.dumps({"rule": "cett"}), "--calibration": path},
            "--search": json.dumps({"max_levels": 3, "resolution": 0.1}),
            "--output": tmp_path / "cett" / "search.json",
        },
    )
    levels = read_manifest(tmp_path / "cett" / "search.json")["levels"]
    assert len(levels) == 3
    for one in levels:
        result = read_manifest(tmp_path / "cett" / one["level"] / "eval.json")
        assert result["calibration"]["digest"] == made.digest


# Calibration text and evaluation text


def about(content: str) -> Calibration:
    return Calibration({}, {"content": content, "text": "", "tokens": 1}, "")


LONG = (
    "It was therefore with some surprise that Mrs. Dobbs heard the familiar groaning begin again."
)


@pytest.mark.parametrize(
    ("seen", "evaluated"),
    [
        (f"Before. {LONG} After.", LONG),
        (LONG[:70], f"Before. {LONG} After."),
        (LONG.replace(" ", "\n"), f"  {LONG}  "),
    ],
)
def test_a_task_that_evaluates_the_calibration_s_text(seen: str, evaluated: str) -> None:
    with pytest.raises(AtlasError, match=r"tasks\.prose: document 1 is part of the text"):
        check_disjoint(about(seen), "prose", [{"page": "x" * 99}, {"a": {"b": ["y", evaluated]}}])


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefg", k=draw.randint(1, 9))) for _ in range(count))


@pytest.mark.parametrize(("characters", "refused"), [(210, True), (140, False)])
def test_a_document_that_is_partly_calibrated_on(characters: int, refused: bool) -> None:
    shared = words(100, 0)[:characters]
    seen, evaluated = f"{words(300, 1)} {shared}", f"{shared} {words(300, 2)}"
    for one, other in ((seen, evaluated), (evaluated, seen)):
        with pytest.raises(AtlasError, match="document 0 is") if refused else nullcontext():
            check_disjoint(about(one), "prose", [{"page": other}])


def test_the_calibrations_text_is_decoded_as_one(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders like Llama 2's drop a space at the beginning, which is none between two rows."""

    class Tokenizer:
        def decode(self, ids: np.ndarray, *, skip_special_tokens: bool) -> str:
            return "".join(f" {one}" for one in ids).lstrip()

    monkeypatch.setattr(calibrate, "load_tokenizer", lambda _: Tokenizer())
    store = ActivationStore(work.store)
    content, _ = calibrate.seen_text(None, store, SEEN)
    assert content == " ".join(map(str, store.ids().flatten()[:SEEN]))


def test_short_strings_turn_up_anywhere() -> None:
    check_disjoint(about(LONG), "prose", [{"word": LONG[:59], "other": LONG.upper()}])


def test_a_stage_refuses_such_a_task(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    seen = calibrated(work, path, "teal", "input").about["content"]
    pages = [*rolling_documents(), {"page": seen[20:120]}]
    task = write_task(tmp_path / "tasks", "pages", pages, **ROLLING)
    session = open_session(work.manifest, {"pages": {**task, "limit": 6}})
    session.check_disjoint(read_calibration(path))  # the last document is not evaluated
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "check_disjoint", None)
        session.with_code("other").check_disjoint(read_calibration(path))  # nor looked at again
    session = open_session(work.manifest, {"pages": task})
    with pytest.raises(AtlasError, match=r"tasks\.pages: document 6 is part of the text"):
        session.check_disjoint(read_calibration(path))


# Configuration


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A task and a text in one file, parted by document."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "tasks", "pages", rolling_documents(), **ROLLING)
    task = Path("tasks/pages.yaml")
    task.write_text(
        task.read_text().replace(str(tmp_path / "tasks" / "pages.jsonl"), "pages.jsonl")
    )
    return {
        "models": {"tiny": {"path": "tiny"}},
        "criteria": {"teal": {}, "topk": {}},
        "texts": {"rest": {"file": "tasks/pages.jsonl", "column": "page", "documents": [4, 6]}},
        "tasks": {"pages": {"include": "tasks", "limit": 4}},
        "capture": {"text": "rest", "tokens": 96, "sequence_length": 16},
        "calibration": {"tokens": 64},
        "run": [{"models": ["tiny"], "criteria": ["teal"], "sites": ["input"], "levels": [0.5]}],
    }


def test_documents_of_a_text(config: dict[str, Any]) -> None:
    check_inputs(parse(config))
    pages = [one["page"] for one in rolling_documents()]
    assert list(documents(config["texts"]["rest"])) == pages[4:6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, "run: criteria: 'teal' is calibrated; say on how many captured"),
        ({"calibration": {"tokens": 72}}, "calibration.tokens: 72 is no multiple of"),
        ({"calibration": {"tokens": 96}}, "calibration.tokens: 96 of capture.tokens"),
        ({"calibration": {"tokens": 0}}, "calibration.tokens: "),
        (
            {"criteria": {"teal": {"allocation": "best"}}},
            r"criteria\.teal: allocation: expected uniform, .*, found 'best'",
        ),
        (
            {"criteria": {"teal": {"rule": "r_sparse", "allocation": "greedy"}}},
            r"criteria\.teal: allocation: this rule takes none",
        ),
        (
            {"criteria": {"teal": {"allocation": "greedy"}}},
            "'teal' is allocated greedily among the tensors of a block, and 'input' is one",
        ),
        (
            {"criteria": {"teal": {"calibration": "each"}}},
            r"criteria\.teal: calibration: expected per_layer or per_expert, found 'each'",
        ),
        (
            {"criteria": {"teal": {"expert_rows": 8}}},
            r"criteria\.teal: expert_rows: needs calibrat",
        ),
        ({"tasks": {"pages": {"include": "tasks"}}}, r"tasks\.pages: 'teal' is calibrated on docu"),
        ({"tasks": {"pages": {"include": "tasks", "limit": 5}}}, r"evaluates its first 5 docum"),
        ({"texts": {"rest": {"file": "tasks/pages.jsonl"}}}, "documents 0 to the last of"),
        ({"texts": {"rest": {"file": "a", "documents": [3, 3]}}}, r"texts\.rest: documents: the"),
        ({"texts": {"rest": {"file": "a", "documents": [3]}}}, r"texts\.rest\.documents: "),
    ],
)
def test_bad_configuration(config: dict[str, Any], change: dict, message: str) -> None:
    data = {key: value for key, value in {**config, **change}.items() if value is not None}
    with pytest.raises(AtlasError, match=message) as caught:
        check_inputs(parse(data))
    assert "\n" not in str(caught.value)


def test_a_rule_at_a_site_where_it_means_nothing(config: dict[str, Any]) -> None:
    config["run"][0]["sites"] = ["input", "gate"]
    with pytest.raises(AtlasError, match="run: sites: 'teal' is not defined at 'gate'; its sites"):
        check_inputs(parse(config))


def test_only_calibrated_criteria_wait_for_a_calibration(config: dict[str, Any]) -> None:
    config["run"][0]["criteria"] = ["teal", "topk"]
    ask = Asks(parse(config), "results")

    class At(NamedTuple):
        model: str
        criterion: str
        site: str

    path = "results/tiny/teal/input/calibration.safetensors"
    assert ask.calibration(At("tiny", "teal", "input")) == [path]
    assert ask.calibration(At("tiny", "topk", "input")) == []


def test_what_does_not_work_in_experts_is_told_to_the_job_that_looks_for_them(
    config: dict[str, Any],
) -> None:
    config["criteria"] |= {
        **{"r_sparse": {}, "cats": {}, "mask": {"rule": "prompt_mask"}},
        **{"chess": {}, "chess_each": {"rule": "chess", "calibration": "per_expert"}},
        "spread": {"rule": "teal", "allocation": "equal_cett"},
    }
    config["run"] = [
        {**config["run"][0], "criteria": names, "sites": [site]}
        for site, names in {
            "input": ["teal", "topk", "r_sparse", "spread"],
            "qkv_input": ["r_sparse", "spread"],  # attention has no experts
            "gate": ["cats", "chess", "chess_each", "mask"],
        }.items()
    ]

    class At(NamedTuple):
        model: str

    lines = json.loads(Asks(parse(config), "results").not_in_experts(At("tiny")))
    assert [line.partition(":")[0] for line in lines] == [
        *("criteria.r_sparse at input", "criteria.spread at input"),
        *("criteria.chess at gate", "criteria.mask at gate"),
    ]


# Export


def exported(work: Work, folder: Path, rule: str, tensor: str, levels: str) -> Calibration:
    """Calibrate a rule and export its levels."""
    made = calibrated(work, folder / "calibration.safetensors", rule, tensor)
    run_stage(
        export,
        {
            **{"--model": work.manifest, "--criterion": json.dumps({"rule": rule})},
            **{"--site": tensor, "--calibration": folder / "calibration.safetensors"},
            **{"--levels": levels, "--output": folder / "thresholds.json"},
            "--settings": json.dumps({"dtype": "auto", "device": "cpu"}),
        },
    )
    return made


@pytest.mark.parametrize(
    ("rule", "tensor"),
    [
        *(("quantile", "intermediate"), ("teal", "input"), ("cats", "gate"), ("countdown_m", "up")),
        *(("chess", "gate"), ("cett", "intermediate"), ("mean_compensation", "up")),
        *(("r_sparse", "input"), ("shifted_relu", "gate")),
    ],
)
def test_exported_thresholds_are_the_masks(
    work: Work, tmp_path: Path, tasks: dict[str, Any], rule: str, tensor: str
) -> None:
    """A kernel that knows the files alone drops what the criterion drops."""
    store = ActivationStore(work.store)
    made = exported(work, tmp_path, rule, tensor, "0,0.3,0.5,1")
    manifest = read_manifest(tmp_path / "thresholds.json")
    assert list(manifest["levels"]) == ["1", "0.5", "0.3", "0"]
    session = open_session(work.manifest, tasks)
    for level, one in manifest["levels"].items():
        assert file_digest(tmp_path / one["file"]) == one["sha256"]
        about = read_manifest(tmp_path / level / "thresholds.json")
        assert (about["level"], about["site"]) == (level, tensor)
        assert about["calibration"] == made.identity()
        tensors = load_file(tmp_path / one["file"])
        assert {name: list(t.shape) for name, t in tensors.items()} == about["tensors"]
        bound = by_tensor(bind_all(create({"rule": rule}), session.parts, tensor, made.states))
        for layer in (0, 1):
            values = torch.from_numpy(store.read(tensor, layer))
            threshold = tensors[f"{tensor}.{layer}.threshold"]
            kept = values > threshold if rule == "shifted_relu" else values.abs() >= threshold
            assert torch.equal(kept, bound[layer, tensor].mask(values, float(level)))
            for path in about["readers"][f"{tensor}.{layer}"]:
                assert session.lm.model.get_submodule(path).in_features == values.shape[1]


def from_file(mlp: Any, rule: str, given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An FFN as a kernel would compute it that knows only what was exported."""
    threshold = given["threshold"]
    if rule == "r_sparse":
        kept = x.abs() >= threshold
        rest = torch.where(kept, 0, x)
        x = torch.where(kept, x, 0) + rest @ given["basis"].T @ given["basis"]
    u, z = mlp.up_proj(x), mlp.gate_proj(x)
    g = mlp.act_fn(z)
    if rule == "mean_compensation":
        g = torch.where(u.abs() >= threshold, g, given["mean"])
    if rule == "shifted_relu":
        shifted = torch.where(g > threshold, (z - given["shift"]).relu(), 0)
        g = g if threshold == -torch.inf else shifted
    return mlp.down_proj(u * g)


@pytest.mark.parametrize("level", ["0", "0.5", "0.9"])
@pytest.mark.parametrize(
    ("rule", "tensor"),
    [("mean_compensation", "up"), ("r_sparse", "input"), ("shifted_relu", "gate")],
)
def test_what_takes_the_place_of_dropped_entries_reaches_the_logits(
    work: Work, tmp_path: Path, tasks: dict[str, Any], rule: str, tensor: str, level: str
) -> None:
    made = exported(work, tmp_path, rule, tensor, level)
    tensors = load_file(tmp_path / level / "thresholds.safetensors")
    session = open_session(work.manifest, tasks)
    model, criterion = session.lm.model, create({"rule": rule})
    ids = torch.from_numpy(ActivationStore(work.store).ids()[:3])
    ones = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        states = made.states
        with sparsified(model, session.parts, tensor, criterion, float(level), states) as counter:
            counter.expect(ones)
            found = model(input_ids=ids).logits
            counter.take()
        for layer, block in enumerate(model.model.layers):
            prefix = f"{tensor}.{layer}."
            given = {name.removeprefix(prefix): t for name, t in tensors.items() if prefix in name}
            block.mlp.forward = partial(from_file, block.mlp, rule, given)
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found, dense, atol=1e-6) == (level == "0")


# What was reached


def test_what_a_level_reached_stands_beside_its_output_error(work: Work, tmp_path: Path) -> None:
    found = calibrated(work, tmp_path / "c.safetensors", "teal", "all_inputs")
    loading = {"dtype": "auto", "device": "cpu", "calibration_tokens": SEEN}
    run_stage(
        output_error,
        {
            **{"--model": work.manifest, "--site": "all_inputs", "--store": work.store},
            **{"--criterion": json.dumps({"rule": "teal"}), "--levels": "0.3,0"},
            **{"--settings": json.dumps(loading), "--output": tmp_path / "sparsity.parquet"},
            "--calibration": tmp_path / "c.safetensors",
        },
    )
    for row in pq.read_table(tmp_path / "sparsity.parquet").to_pylist():
        asked = [] if row["level"] == "0" else ["input", "intermediate"]
        assert [one["tensor"] for one in row["targets"]] == asked
        for one in row["targets"]:
            assert (one["of"], one["target"]) == ("sparsity", pytest.approx(0.3))
            assert one["reached"] == pytest.approx(0.3, abs=1e-3)
    assert found.about["tokens"] == SEEN


def test_the_plan_tells_of_targets_that_were_not_reached(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["run"][0]["levels"] = [0.9, 0.5]
    table = torch.linspace(0, 1, 10_001)
    table[8300:9500], table[-1] = 0.83, torch.inf  # eight in a hundred tie
    states = {"input.0": {"table": table}, "input.1": {"table": torch.linspace(0, 1, 10_001)}}
    results = tmp_path / "results"
    write_calibration(results / "tiny/teal/input/calibration.safetensors", states, {})
    unknowns = Unknowns()
    told = list(missed_targets(parse(config), results, unknowns))
    assert told == ["tiny/teal/input/0.9: input.0 83.0% of 90.0%"]
    # Of a search what it begins with, then what it chose; and what single layers are tried at.
    config["run"][0] |= {"levels": "auto", "sensitivity": [0.95]}
    states["input.0"]["table"][8000:] = torch.inf
    write_calibration(results / "tiny/teal/input/calibration.safetensors", states, {})
    for level in ("0.8", "0.85"):
        told = [line.split(":")[0] for line in missed_targets(parse(config), results, unknowns)]
        assert told == [f"tiny/teal/input/{one}" for one in ("0.95", level)]
        write_manifest(results / "tiny/teal/input/search.json", {"levels": [{"level": "0.85"}]})
    (results / "tiny/teal/input/calibration.safetensors").write_bytes(b"")
    assert not list(missed_targets(parse(config), results, unknowns))
    assert list(unknowns.values()) == [["targets of tiny/teal/input"]]
