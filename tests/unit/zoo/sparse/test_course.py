"""Trainings that begin with a checkpoint, penalise, end in FATReLU, keep stages, or are interrupted."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from model_parts import ffns_of
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.zoo import batches, card, fit, recipe, train
from sparsity_atlas.zoo.sparse import zeros
from sparsity_atlas.zoo.sparse.course import Course
from sparsity_atlas.zoo.sparse.penalty import Stages
from sparsity_atlas.zoo.sparse.state import State
from sparsity_atlas.zoo.sparse.variants import variant
from sparsity_atlas.zoo.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ZOO = Path(__file__).parents[4] / "workflow" / "resources" / "zoo"
CONTEXT = 32
TINY = recipe.Architecture(width=32, layers=2, ffn_width=48, learning_rate=1e-2)
RELU = replace(TINY, activation="relu")
SHORT = recipe.Training(steps=20, batch_tokens=8 * CONTEXT, context=CONTEXT, vocab_size=300)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts() -> train.Texts:
    draw = random.Random(0)
    words = ["cat", "river", "sees", "follows", "sailor", "letter", "hides", "garden", "the", "old"]
    paragraphs = [" ".join(draw.choices(words, k=12)) + "." for _ in range(200)]
    tokenizer = train_tokenizer(paragraphs, SHORT.vocab_size)
    encoded, valid = (batches.encode(tokenizer, part) for part in (paragraphs, paragraphs[:9]))
    return train.Texts(tokenizer, encoded, valid, "made-up sentences")


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "base"
    train.train_model("base", TINY, SHORT, texts, folder, CPU)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_relufication_begins_with_the_weights_and_ends_with_the_relu(texts, base, tmp_path):
    shape = replace(RELU, learning_rate=0.0)  # nothing is learnt, but for rounding all stays
    record = train.train_model(
        "still", shape, replace(SHORT, steps=1), texts, tmp_path, CPU, Course(base=base)
    )
    for name, kept in weights(tmp_path).items():
        torch.testing.assert_close(kept, weights(base)[name], rtol=0, atol=0)
    model = load(Checkpoint(tmp_path), dtype="float32", device="cpu")
    assert model.config.hidden_act == "relu"
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["from"] == "base"
    assert "from the weights of zoo-base" in (tmp_path / "README.md").read_text()
    assert record.zeros == zeros.measure(
        model, *batches.evaluation_blocks(texts.valid.ids, CONTEXT)
    )


def test_the_penalty_and_the_threshold_make_exact_zeros(texts, base, tmp_path):
    """Of the same checkpoint, the same windows and steps: with L1 more is zero, with FATReLU more still."""
    rising = Stages(((0, 0.0), (4, 0.0), (10, 0.3)))
    records = {
        name: train.train_model(name, RELU, SHORT, texts, tmp_path / name, CPU, course)
        for name, course in {
            "relu": Course(base),
            "l1": Course(base, rising),
            "fat": Course(base, rising, fatrelu=0.02),
        }.items()
    }
    shares = {name: np.mean(record.zeros) for name, record in records.items()}
    assert 0.2 < shares["relu"] < shares["l1"] - 0.1 < shares["fat"] - 0.1
    # FATReLU comes when the training is over.
    for name, kept in weights(tmp_path / "fat").items():
        assert torch.equal(kept, weights(tmp_path / "l1")[name])
    model = load(Checkpoint(tmp_path / "fat"), dtype="float32", device="cpu")
    assert [ffn.tensors for ffn in ffns_of(find_parts(model))] == [
        ("input", "up", "gate", "intermediate")
    ] * 2
    inputs, targets = batches.evaluation_blocks(texts.valid.ids, CONTEXT)
    seen, gates = [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        layer.mlp.act_fn.register_forward_hook(lambda _, given, out: gates.append((given[0], out)))
    with torch.inference_mode():
        model(torch.from_numpy(inputs))
    valid = torch.from_numpy(targets != batches.IGNORED)
    for i, (before, after), share in zip(seen, gates, records["fat"].zeros, strict=True):
        assert torch.equal(after == 0, before < 0.02)
        assert share == pytest.approx(float((i[valid] == 0).double().mean()), abs=1e-12)
    facts = json.loads((tmp_path / "fat" / "training.json").read_text())
    assert (facts["l1"], facts["fatrelu"]) == ([[0, 0.0], [4, 0.0], [10, 0.3]], 0.02)
    assert card.card(facts) == (tmp_path / "fat" / "README.md").read_text()
    assert "FATReLU gate" in card.card(facts)


def test_checkpoints_are_those_of_a_training_and_do_not_change_it(texts, base, tmp_path):
    course = Course(checkpoints=(5, 10))
    train.train_model("base", TINY, SHORT, texts, tmp_path, CPU, course)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-10", "step-20", "step-5", "tokenizer.json", "tokenizer_config.json"),
    ]
    for name, kept in weights(tmp_path / "step-20").items():
        assert torch.equal(kept, weights(base)[name])
    facts = {
        step: json.loads((tmp_path / f"step-{step}" / "training.json").read_text())
        for step in (5, 10, 20)
    }
    for step, found in facts.items():
        assert found["steps_done"] == step
        assert found["tokens_seen"] == step * SHORT.batch_tokens
        assert card.card(found) == (tmp_path / f"step-{step}" / "README.md").read_text()
    losses = [found["valid"]["nats_per_token"] for found in facts.values()]
    assert losses == sorted(losses, reverse=True)
    # What a model is after five steps: the schedule is that of the whole training.
    model = fit.build_model(TINY, SHORT)
    steps = 0

    def stop(done, _):
        nonlocal steps
        steps = done
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit.fit(model, texts.train, TINY, SHORT, CPU, course, stop)
    assert steps == 5
    kept = weights(tmp_path / "step-5")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.bfloat16(), kept[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("The old cat.")["input_ids"]) == "The old cat."


def test_an_interrupted_training_goes_on_with_the_same_bytes(texts, base, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "_REPORT_EVERY", 5)
    state = State(tmp_path / "state" / "base.pt", {"steps": 20}, every=5)
    write, saved = State.save, []

    def interrupted(self, step, *rest):
        write(self, step, *rest)
        saved.append(step)
        if saved == [5, 10]:
            raise InterruptedError

    monkeypatch.setattr(State, "save", interrupted)

    def go_on() -> card.Record:
        return train.train_model("base", TINY, SHORT, texts, tmp_path / "out", CPU, Course(), state)

    with pytest.raises(InterruptedError):
        go_on()
    other = replace(state, settings={"steps": 21})
    with pytest.raises(AtlasError, match=r"--state: .*it is of another training"):
        train.train_model("base", TINY, SHORT, texts, tmp_path / "out", CPU, Course(), other)
    record = go_on()
    assert saved == [5, 10, 15]
    assert [step for step, _ in record.curve] == [5, 10, 15, 20]
    assert not state.path.exists()
    ours, whole = (folder / "model.safetensors" for folder in (tmp_path / "out", base))
    assert ours.read_bytes() == whole.read_bytes()


def test_another_shape_is_no_beginning(texts, base, tmp_path):
    ungated = replace(RELU, gated=False, ffn_width=72)
    for shape, where in ((ungated, "up_proj"), (replace(TINY, width=64), "embed_tokens")):
        with pytest.raises(
            AtlasError, match=rf"--from: .*of another shape: model.*{where}|down_proj"
        ):
            train.train_model("x", shape, SHORT, texts, tmp_path, CPU, Course(base))
    with pytest.raises(AtlasError, match=r"--from: .*no such file"):
        train.train_model("x", TINY, SHORT, texts, tmp_path, CPU, Course(tmp_path))


def run(tmp_path: Path, *options: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The old man saw {n} ships that day." for n in range(200)))
    common = ["--corpus", str(text), "--valid", str(text), "--tokenizer", str(ZOO / "small")]
    sizes = ["--steps", "1", "--batch-tokens", "512", "--device", "cpu"]
    train.main([*options, *common, *sizes, "--out", str(tmp_path / "out")])


def test_the_command_names_what_it_trains(tmp_path):
    run(tmp_path, "--model", "tiny", "--activation", "relu2", "--ungated")
    folder = tmp_path / "out" / "tiny-relu2-ungated"
    facts = json.loads((folder / "training.json").read_text())
    assert (
        recipe.described(facts["architecture"])
        == variant("tiny", recipe.architecture("tiny"), "relu2", True)[1]
    )
    assert facts["model"] == "tiny"
    assert "    sparsity-atlas zoo train --model tiny --corpus TRAIN" in card.card(facts)
    assert card.card(facts).count("--activation relu2") == card.card(facts).count("--ungated") == 1
    assert 0.3 < np.mean(facts["zeros"]) < 0.7
    model = load(Checkpoint(folder), dtype="float32", device="cpu")
    assert type(model).__name__ == "ArceeForCausalLM"
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-6, 10000)
    assert [ffn.tensors for ffn in ffns_of(find_parts(model))] == [("input", "intermediate")] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "tiny", "small", "--name", "x"], "--name: found 2 models"),
        (["--model", "medium-moe", "--ungated"], "medium-moe: its experts are gated"),
        (["--model", "medium-moe", "--l1", "0:1"], "--l1: expected a dense causal model"),
        (["--model", "tiny", "--fatrelu", "0.01"], "--fatrelu: it takes the place of relu, found"),
        (["--model", "medium-relu", "--fatrelu", "-1"], "--fatrelu: found -1.0, expected"),
        (["--model", "tiny", "--checkpoints", "1"], "--checkpoints: found 1, expected steps betw"),
        (["--model", "tiny", "--l1", "x"], "--l1: found 'x'"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(tmp_path, options, expected):
    with pytest.raises(AtlasError) as refused:
        run(tmp_path, *options)
    assert expected in str(refused.value)
    assert not (tmp_path / "out").exists()
