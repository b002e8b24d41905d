"""The stage that captures a model's own answers: which they are, their last tokens, kills, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsity_atlas.activations.point_dimension import point_dimensions
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.truthfulness import last_tokens, own_answers, predictors
from sparsity_atlas.upkeep import kept_answers
from tiny_lm import (
    CHOICE,
    GENERATION,
    MAX_LENGTH,
    ROLLING,
    choice_documents,
    rolling_documents,
    run_stage,
    sentences,
    settings,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TENSORS = ["residual", "input", "intermediate"]


def answer(
    manifest: Path,
    folder: Path,
    entry: dict[str, Any],
    *,
    metric: str | None = None,
    tensors: list[str] = TENSORS,
    samples: int = 100,
    name: str = "task",
) -> Path:
    """The stage's manifest."""
    output = folder / "answers" / f"{name}.json"
    study = {"metric": metric, "tensors": tensors, "samples": samples}
    run_stage(
        own_answers,
        {
            **{"--model": manifest, "--settings": json.dumps(settings({name: entry}))},
            **{"--study": json.dumps(study), "--code": "test"},
            **{"--output": output, "--samples": output.with_suffix(".parquet")},
        },
    )
    return output


class Plain:
    """The model by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Token ids of a prompt and an answer, and how many are the answer's."""
        whole = self.tokenizer(prompt + text)["input_ids"]
        return whole[-MAX_LENGTH:], len(whole) - len(self.tokenizer(prompt)["input_ids"])

    def writes(self, prompt: str) -> str:
        """What `GENERATION` asks for."""
        ids = self.tokenizer(prompt)["input_ids"][-(MAX_LENGTH - 12) :]
        with torch.no_grad():
            made = self.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        text = self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        return str(re.split("[e\n]", text)[0])

    def likely(self, prompt: str, text: str) -> np.ndarray:
        """Log-probability of each of an answer's tokens."""
        ids, count = self.read(prompt, text)
        with torch.no_grad():
            found = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(max(len(ids) - count, 1), len(ids))
        return np.array([float(found[place - 1, ids[place]]) for place in places])

    def last(self, prompt: str, text: str) -> dict[tuple[str, int], np.ndarray]:
        """Vectors of the last token, read off the layers one by one."""
        ids, _ = self.read(prompt, text)
        found, handles = {}, []
        for number, layer in enumerate(self.model.model.layers):

            def outputs(_: Any, __: Any, value: Any, number: int = number) -> None:
                value = value if isinstance(value, torch.Tensor) else value[0]
                found["residual", number] = value[0, -1].numpy()

            def inputs(_: Any, value: Any, number: int = number) -> None:
                found["input", number] = value[0][0, -1].numpy()

            def product(_: Any, value: Any, number: int = number) -> None:
                found["intermediate", number] = value[0][0, -1].numpy()

            handles += [
                layer.register_forward_hook(outputs),
                layer.mlp.register_forward_pre_hook(inputs),
                layer.mlp.down_proj.register_forward_pre_hook(product),
            ]
        with torch.no_grad():
            self.model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return found


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Plain:
    return Plain(model_folder)


def check_vectors(output: Path, wanted: list[dict[tuple[str, int], np.ndarray]]) -> None:
    store = ActivationStore(output.with_suffix(".zarr"))
    for place in wanted[0]:
        found = store.read(*place)
        assert found.shape[0] == len(wanted)
        np.testing.assert_allclose(found, [one[place] for one in wanted], rtol=1e-4, atol=1e-5)
    assert kept_answers.problem(output) == ""


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices(tmp_path: Path, manifest: Path, plain: Plain, metric: str) -> None:
    documents = choice_documents(20)
    entry = write_task(tmp_path / "tasks", "choices", documents, **CHOICE)
    output = answer(manifest, tmp_path, entry, metric=metric)
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert [row["doc_id"] for row in rows] == list(range(20))
    chosen = []
    for row, document in zip(rows, documents, strict=True):
        options = [f" {one}" for one in document["choices"]]
        likely = [plain.likely(document["context"], one) for one in options]
        lengths = [len(one) for one in document["choices"]] if metric == "acc_norm" else 1
        scores = np.array([one.sum() for one in likely]) / lengths
        best = int(scores.argmax())
        assert row["value"] == (best == document["label"])
        assert row["margin"] == pytest.approx(np.sort(scores)[-1] - np.sort(scores)[-2], abs=1e-4)
        assert row["logprob"] == pytest.approx(likely[best].mean(), abs=1e-4)
        assert row["tokens"] == len(likely[best])
        chosen.append(plain.last(document["context"], options[best]))
    check_vectors(output, chosen)
    about = read_manifest(output)
    assert (about["metric"], about["samples"], about["without_answer"]) == (f"{metric},none", 20, 0)


def test_what_it_wrote(tmp_path: Path, manifest: Path, plain: Plain) -> None:
    """Of 12 texts some are empty: the first token may be the end."""
    pages = sentences(24, 3, 3, 20)
    entry = write_task(
        tmp_path / "tasks", "writing", [{"page": page} for page in pages], **GENERATION
    )
    output = answer(manifest, tmp_path, entry)
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    about = read_manifest(output)
    assert about["without_answer"] == 24 - len(rows) > 0
    assert len(rows) > 5
    wanted = []
    for row in rows:
        page = pages[row["doc_id"]]
        text = plain.writes(page)
        assert row["margin"] is None
        assert row["logprob"] == pytest.approx(plain.likely(page, text).mean(), abs=1e-4)
        wanted.append(plain.last(page, text))
    check_vectors(output, wanted)


def test_what_tells_right_ones_of_what_it_wrote(
    tmp_path: Path, manifest: Path, plain: Plain
) -> None:
    """Half of the references are what the model writes; the areas are those of vectors read off the model."""
    pages = sentences(70, 5, 3, 20)
    texts = [plain.writes(page) for page in pages]
    documents = [
        {"page": page, "reference": text if place % 2 else "another"}
        for place, (page, text) in enumerate(zip(pages, texts, strict=True))
    ]
    asked = {**GENERATION, "doc_to_target": "{{reference}}"}
    entry = write_task(tmp_path / "tasks", "writing", documents, **asked)
    output = answer(manifest, tmp_path, entry, metric="exact_match", tensors=["residual"])
    written = [place for place, text in enumerate(texts) if text]
    right = np.array([place % 2 == 1 for place in written])
    rows = {
        (row["predictor"], row.get("layer")): row
        for row in predictors.study(output, [], {"neighbours": 4, "replicates": 20, "seed": 0})
    }
    likely = np.array([plain.likely(pages[one], texts[one]).mean() for one in written])
    vectors = [plain.last(pages[one], texts[one]) for one in written]
    layers = sorted(layer for name, layer in vectors[0] if name == "residual")
    points = {one: np.array([each["residual", one] for each in vectors]) for one in layers}
    told = {layer: point_dimensions(some.astype(float), 4, 0)[0] for layer, some in points.items()}
    for key, scores in {
        ("logprob", None): likely,
        **{("lid", i): -told[i] for i in layers},
    }.items():
        pairs = scores[right][:, None] - scores[~right]
        wanted = ((pairs > 0) + (pairs == 0) / 2).mean()
        assert rows[key]["auroc"] == pytest.approx(wanted, abs=0.02)  # float32 may turn near ties
        assert (rows[key]["samples"], rows[key]["right"]) == (len(written), right.sum())
        assert rows[key]["reference"] == "logprob"
    assert ("margin", None) not in rows


def test_samples_are_spread_evenly(tmp_path: Path, manifest: Path) -> None:
    entry = write_task(tmp_path / "tasks", "choices", choice_documents(21), **CHOICE)
    output = answer(manifest, tmp_path, entry, samples=5, tensors=["input"])
    rows = pq.read_table(output.with_suffix(".parquet")).to_pylist()
    assert [row["doc_id"] for row in rows] == [0, 5, 10, 15, 20]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_stopped_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of one batch, stopped before each pass in turn: none is repeated that has ended."""
    entry = write_task(tmp_path / "tasks", "choices", choice_documents(14), **CHOICE)
    monkeypatch.setattr(own_answers, "BATCHES", 1)
    answer(manifest, tmp_path / "whole", entry)
    own, passes, allowed = last_tokens.run, 0, 1

    class Stopped(Exception):
        pass

    def run(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > allowed:
            raise Stopped
        return own(*arguments)

    monkeypatch.setattr(last_tokens, "run", run)
    for _ in range(3):
        passes = 0
        with pytest.raises(Stopped):
            answer(manifest, tmp_path / "cut", entry)
        assert not (tmp_path / "cut/answers/task.json").exists()
    passes, allowed = 0, 9
    answer(manifest, tmp_path / "cut", entry)
    assert passes == 1  # of four: three stand
    assert content(tmp_path / "cut/answers") == content(tmp_path / "whole/answers")


def test_another_study_begins_anew(tmp_path: Path, manifest: Path) -> None:
    entry = write_task(tmp_path / "tasks", "choices", choice_documents(14), **CHOICE)
    answer(manifest, tmp_path, entry)
    output = answer(manifest, tmp_path, entry, tensors=["input"])
    assert set(read_manifest(output)["tensors"]) == {"input"}
    assert sorted(ActivationStore(output.with_suffix(".zarr")).root) == ["input"]


def test_damage_is_found(tmp_path: Path, manifest: Path) -> None:
    entry = write_task(tmp_path / "tasks", "choices", choice_documents(14), **CHOICE)
    output = answer(manifest, tmp_path, entry, tensors=["input"])
    store = output.with_suffix(".zarr")
    chunk = next(one for one in store.rglob("*") if one.is_file() and one.name != "zarr.json")
    spoilt = bytearray(chunk.read_bytes())
    spoilt[-3] ^= 255
    chunk.write_bytes(spoilt)
    assert kept_answers.problem(output)
    samples = output.with_suffix(".parquet")
    samples.write_bytes(samples.read_bytes()[:-9])
    assert "task.parquet" in (kept_answers.problem(output) or "")


def test_nan_is_a_result(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_task(tmp_path / "tasks", "choices", choice_documents(14), **CHOICE)
    monkeypatch.setattr(last_tokens, "_is_finite", lambda values: False)
    about = read_manifest(answer(manifest, tmp_path, entry))
    assert about["status"] == "failed"
    assert about["reason"].startswith("NaN or infinity in the vectors of last tokens")


def test_a_task_without_answers_is_refused(tmp_path: Path, manifest: Path) -> None:
    entry = write_task(tmp_path / "tasks", "texts", rolling_documents(), **ROLLING)
    with pytest.raises(AtlasError, match="'task' asks for loglikelihood_rolling, in which a model"):
        answer(manifest, tmp_path, entry)


def test_a_tensor_that_no_layer_has_is_refused(tmp_path: Path, manifest: Path) -> None:
    from sparsity_atlas.sites.find import find_parts

    parts = find_parts(Plain(Path(read_manifest(manifest)["source"]["path"])).model)
    assert len(last_tokens.places(parts, ["residual", "gate"])) == 4
    alone = [part for part in parts if part.name == "ffn"]
    with pytest.raises(AtlasError, match="no layer has 'o_input' with one vector a token"):
        last_tokens.places(alone, ["o_input"])


def test_what_is_left_over(tmp_path: Path) -> None:
    """Stores and journals without a manifest, of what no run asks for; a journal of what is finished."""
    from sparsity_atlas.config.schema import parse

    config = parse(
        {
            "models": {"m": {"path": "m"}},
            "criteria": {"topp": {}},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {"a": {}, "a.b": {}},
            "run": [{"models": ["m"], "levels": [1]}],
            "studies": {"truthfulness": {"tasks": ["a"]}},
        }
    )
    folder = tmp_path / "m" / "answers"
    for name in ("a", "a.b", "c"):
        (folder / f"{name}.zarr").mkdir(parents=True)
        (folder / f"{name}.journal").touch()
        (folder / f"{name}.zarr.journal").touch()
    (folder / "c.json").touch()
    found = {path.name: reason for path, reason in kept_answers.left_over(tmp_path, config)}
    assert found == {
        **dict.fromkeys(
            ("a.b.zarr", "a.b.journal", "a.b.zarr.journal"), "its answers are not asked for"
        ),
        **dict.fromkeys(("c.journal", "c.zarr.journal"), "its answers are captured"),
    }


def test_the_columns_are_written_down() -> None:
    from checkout import ROOT
    from sparsity_atlas.truthfulness.truth_table import TRUTHFULNESS

    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for title, names in (
        ("truthfulness.csv", TRUTHFULNESS),
        ("{model}/answers/{task}.parquet", own_answers.SCHEMA.names),
    ):
        section = text.partition(f"### `{title}`")[2].partition("### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names
