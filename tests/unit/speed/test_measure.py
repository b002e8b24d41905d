"""The stage `speed` on a model that takes microseconds: what its rows say, not how fast they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT
from mixtures import tiny_mixture
from sparsity_atlas.activations import capture
from sparsity_atlas.criteria import create
from sparsity_atlas.decoding.trial import Time
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.lm.continuous.recorded_step import Step
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.find import describe_parts, find_parts, random_ids
from sparsity_atlas.speed import measure
from sparsity_atlas.speed.speed_table import OK, REFUSED, SCHEMA, SPEED, TOKEN, speed_rows
from sparsity_atlas.terms import CAUSAL, DIFFUSION
from tiny_lm import run_stage, sentences
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def critical(
    task: str,
    kind: str,
    label: str,
    value: float | None,
    relation: str = "=",
    bar: float = 0.99,
    level: float | None = None,
) -> dict[str, Any]:
    """A row of a curve's critical sparsities."""
    named = {"task": task, "kind": kind, "bar": bar, "bar_label": label}
    return {**named, "value": value, "relation": relation, "crossing_level": level}


CURVE = {
    "points": [
        {"task": task, "level": level, "sparsity": sparsity}
        for task in ("prose", "more")
        for level, sparsity in (("dense", 0.0), ("0.9", 0.25), ("0.5", 0.75))
    ],
    "critical": [
        critical("prose", "loss", "PPL-1%", 0.4, level=0.8),
        critical("pairs", "accuracy", "99%", 0.3),
        # Never below the bar: at the largest sparsity.
        critical("average", "accuracy", "99%", 0.5, ">="),
        critical("prose", "loss", "PPL-5%", 0.6, bar=0.95),
        critical("more", "loss", "PPL-1%", None, "none"),
        # Below it from the first level on: no sparsity that keeps quality.
        critical("third", "loss", "PPL-1%", 0.2, "<"),
    ],
}
SETTINGS = {"device": "cpu", "dtype": "float32", "contexts": [6], "tokens": [1, 2]}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little weights, and as few times as there can be."""
    monkeypatch.setattr("sparsity_atlas.decoding.trial.COLD", {"cpu": 0.0})
    monkeypatch.setattr("sparsity_atlas.speed.part_times.REPEATS", 4)
    monkeypatch.setattr("sparsity_atlas.speed.token_times.ROUNDS", 2)
    for module in ("decoder", "token_times"):
        monkeypatch.setattr(f"sparsity_atlas.speed.{module}.STEPS", 2)
    monkeypatch.setattr(measure, "SHARES", (0.0, 0.5, 0.9))


def rows_of(
    model: Any, site: str, rule: str = "topp", kind: str = CAUSAL, **settings: Any
) -> list[dict[str, Any]]:
    parts = find_parts(model)
    config = model.config
    manifest = {
        **{"ffn": describe_parts(parts), "parameters": count_parameters(model, parts)},
        **{"kind": kind, "hidden": config.hidden_size, "memory": {"vocabulary": config.vocab_size}},
    }
    ids = random_ids(model, (4, 16)).numpy()
    criterion = create({"rule": rule})
    given = SETTINGS | settings
    return list(measure.rows(manifest, model, site, criterion, None, CURVE, ids, given))


def test_the_points_of_a_curve() -> None:
    assert measure.own_points(CURVE) == {"prose PPL-1%": (0.4, 0.8), "average 99%": (0.5, None)}
    assert measure.nodes_of(CURVE) == [(0.9, 0.25), (0.5, 0.75)]


def test_maps_and_whole_tokens_are_timed_at_shares_and_at_the_curves_own() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    rows = rows_of(model, "all_inputs")
    assert {row["timed"] for row in rows} == {"ffn", TOKEN}
    assert {row["status"] for row in rows} == {OK}
    # Of each: two numbers of tokens, two kinds of threshold, three shares and two points of the curve.
    assert len(rows) == 2 * 2 * 2 * 5
    whole = [row for row in rows if row["timed"] == TOKEN]
    assert {row["context"] for row in whole} == {6}
    for row in rows:
        if not row["of"]:
            assert row["sparsity"] == pytest.approx(row["wanted"], abs=0.02)
    own = {(row["of"], row["wanted"], row["level"]) for row in rows if row["of"] == "prose PPL-1%"}
    assert own == {("prose PPL-1%", 0.4, 0.8)}
    # One token meets all weights of the FFNs, and of those of attention and the head none is spared.
    ffns = sum(
        part.size("input") * part.size("intermediate") * 3 for part in find_parts(model)[1::2]
    )
    least = max(whole, key=lambda row: row["sparsity"] if row["tokens"] == 1 else 0)
    read = (
        count_parameters(model)["non_embedding"]
        + model.config.hidden_size * model.config.vocab_size
    )
    assert least["unread_share"] < least["sparsity"] * ffns / read * 1.1
    assert least["bytes_read"] == pytest.approx((1 - least["unread_share"]) * read * 4, abs=1)


@pytest.mark.parametrize(("step", "steps"), [(0.001, 16), (0.125, 8), (3.0, 4)])
def test_tokens_of_a_slow_model_are_timed_in_rounds_of_fewer(
    step: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def timed(decoder: Any, context: int, rounds: int, steps: int, longest: float = 0) -> Time:
        asked.append((rounds, steps))
        return Time(step * 1e6, 0.0)

    monkeypatch.setattr("sparsity_atlas.speed.decoder.Decoder.timed", timed)
    monkeypatch.setattr("sparsity_atlas.speed.token_times.STEPS", 16)
    rows = rows_of(tiny_model("llama"), "intermediate", tokens=[1])
    whole = [row for row in rows if row["timed"] == TOKEN]
    # One to see how long a step takes; dense ones before and behind the others.
    assert len(asked) == 1 + len(whole) + 2
    assert asked[0] == (2, 4)
    assert set(asked[1:]) == {(2, steps)}


def test_layers_that_are_not_joined_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparsity_atlas.speed.token_times.records", lambda device: True)
    with caplog.at_level("INFO", "sparsity_atlas"):
        rows = rows_of(tiny_model("gemma2"), "intermediate")
    assert [text for text in caplog.messages if "joined" in text] == [
        "whole tokens: 2 of 2 layers (Gemma2DecoderLayer) are timed as the model has them, the others with "
        "their small steps joined, dense and sparse alike"
    ]
    assert {row["layers"] for row in rows if row["timed"] == TOKEN} == {0}


def test_a_step_that_waits_for_the_host_has_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of mixtures and of Gemma 3n do on a GPU."""

    def record(step: Step) -> None:
        raise RuntimeError(
            "Cannot copy between tensors during capture. Please use tensor.pin_memory()\nC++"
        )

    monkeypatch.setattr(Step, "record", record)
    monkeypatch.setattr("sparsity_atlas.speed.decoder.records", lambda device: True)
    rows = rows_of(tiny_model("llama"), "intermediate")
    (refused,) = [row for row in rows if row["timed"] == TOKEN]
    assert refused["status"] == REFUSED
    assert refused["reason"] == (
        "a step of it cannot be recorded on a GPU: Cannot copy between tensors during capture"
    )
    assert {row["status"] for row in rows if row["timed"] == "ffn"} == {OK}


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_maps_of_a_class_of_their_own_are_timed(name: str) -> None:
    rows = rows_of(tiny_model(name, initializer_range=0.3), "all_linear_inputs", tokens=[1])
    assert {row["status"] for row in rows} == {OK}
    assert TOKEN in {row["timed"] for row in rows}


@pytest.mark.parametrize(
    ("site", "timed", "refused"),
    [("all_inputs", {"up and gate", "down", TOKEN}, {"ffn"}), ("gate", set(), {"ffn", TOKEN})],
)
def test_an_ffn_that_is_refused_as_a_whole_still_has_its_maps(
    site: str, timed: set[str], refused: set[str]
) -> None:
    rows = rows_of(tiny_model("llama", hidden_act="gelu"), site, tokens=[1])
    assert {row["timed"] for row in rows if row["status"] == OK} == timed
    why = {row["timed"]: row["reason"] for row in rows if row["status"] == REFUSED}
    assert set(why) == refused
    assert all("none of plain maps with silu or relu" in one for one in why.values())
    instead = "its maps are timed one by one" if timed else "a factor by itself has no product"
    assert why["ffn"].endswith(f"with silu or relu; {instead}")


def test_experts_leave_what_stands_beside_them() -> None:
    rows = rows_of(tiny_mixture("qwen2_moe"), "intermediate", tokens=[1])
    refused = {row["timed"]: row["reason"] for row in rows if row["status"] == REFUSED}
    assert refused == dict.fromkeys(("experts", TOKEN), "routed experts have no sparse products")
    assert "ffn" in {row["timed"] for row in rows if row["status"] == OK}


@pytest.mark.parametrize(
    ("name", "rule", "reason"),
    [
        ("mixtral", "topp", "routed experts have no sparse products"),
        ("qwen2_moe", "wina", "each routed expert has a rule of its own"),
    ],
)
def test_experts_alone_or_with_rules_of_their_own(name: str, rule: str, reason: str) -> None:
    rows = rows_of(tiny_mixture(name), "intermediate", rule, tokens=[1])
    assert [(row["timed"], row["reason"]) for row in rows] == [("maps", reason), (TOKEN, reason)]


@pytest.mark.parametrize(
    ("rule", "site", "reason"),
    [
        ("random", "input", "Random: its masks follow from no threshold of one token"),
        ("topp", "all_linear_inputs@projections", "have masks of their own"),
    ],
)
def test_what_gains_nothing_is_said(rule: str, site: str, reason: str) -> None:
    rows = rows_of(tiny_model("llama"), site, rule)
    assert [(row["timed"], row["status"]) for row in rows] == [("maps", REFUSED), (TOKEN, REFUSED)]
    assert all(reason in row["reason"] for row in rows)


def test_masked_diffusion_has_no_single_tokens() -> None:
    rows = rows_of(tiny_model("llama", is_causal=False), "input", kind=DIFFUSION)
    assert [(row["timed"], row["status"]) for row in rows] == [("maps", REFUSED), (TOKEN, REFUSED)]
    assert all("a denoising pass goes over more tokens" in row["reason"] for row in rows)


def test_a_context_beyond_the_models_is_refused() -> None:
    rows = rows_of(tiny_model("llama"), "input", contexts=[100_000], tokens=[1])
    (whole,) = (row for row in rows if row["timed"] == TOKEN)
    assert whole["status"] == REFUSED
    assert (whole["context"], "100002 are wanted" in whole["reason"]) == (100_000, True)


def stage(manifest: Path, folder: Path, **settings: Any) -> Path:
    """The stage by its command line, of a model whose text is captured."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(80, seed=3)))
    given = {"dtype": "auto", "device": "cpu", "text": {"file": str(text)}, "tokens": 160}
    given |= {"sequence_length": 16, "batch_size": 4, "add_bos_token": None}
    run_stage(
        capture,
        {
            **{"--model": manifest, "--site": "intermediate", "--siblings": "intermediate"},
            **{"--settings": json.dumps(given), "--store": folder / "activations.zarr"},
            "--output": folder / "capture/intermediate.json",
        },
    )
    output = folder / "tiny/topp/intermediate/speed.parquet"
    write_manifest(output.with_name("curve.json"), CURVE)
    run_stage(
        measure,
        {
            **{"--model": manifest, "--site": "intermediate", "--calibration": ""},
            **{"--store": folder / "activations.zarr", "--output": output},
            **{
                "--criterion": json.dumps({"rule": "topp"}),
                "--curve": output.parent / "curve.json",
            },
            "--settings": json.dumps({**SETTINGS, "calibration_tokens": 32, **settings}),
        },
    )
    return output


def test_the_command_names_the_machine(manifest: Path, tmp_path: Path) -> None:
    rows = list(speed_rows([stage(manifest, tmp_path, tokens=[1], contexts=[])]))
    assert list(rows[0]) == SPEED
    assert {(row["model"], row["criterion"], row["site"]) for row in rows} == {
        ("tiny", "topp", "intermediate")
    }
    assert {row["timed"] for row in rows} == {"ffn"}
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all("1 thread" in row["device"] and "numba" in row["versions"] for row in rows)


def test_the_command_waits_for_the_machine(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it loads anything: whoever waits takes no memory from the one that is timed."""

    def busy() -> None:
        raise AtlasError("busy")

    monkeypatch.setattr("sparsity_atlas.speed.machine.alone", busy)
    monkeypatch.setattr(measure, "load", None)
    with pytest.raises(AtlasError, match="busy"):
        stage(manifest, tmp_path)


def test_too_little_text_ends_in_one_line(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"capture\.tokens: 0 are too few to time 16 tokens"):
        # All is left to calibrations.
        stage(manifest, tmp_path, tokens=[16], calibration_tokens=160)


def test_the_columns_are_written_down() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for title, names in (
        ("speed.csv", SPEED),
        ("{model}/{criterion}/{site}/speed.parquet", SCHEMA.names),
    ):
        section = text.partition(f"### `{title}`")[2].partition("### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names
