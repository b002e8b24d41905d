"""The recipe of the embedded models, tried on a tiny one; and the models that it made."""

import json
import lzma
import random
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo import batches, bound, card, corpus, fit, loss, recipe, train
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT, MASK, as_pretrained, train_tokenizer

ZOO = Path(__file__).parents[3] / "workflow" / "resources" / "zoo"

CONTEXT = 32
TINY = recipe.Architecture(width=32, layers=2, ffn_width=48, learning_rate=1e-2)
SHORT = recipe.Training(steps=40, batch_tokens=8 * CONTEXT, context=CONTEXT, vocab_size=320)
CPU = torch.device("cpu")


def _text(paragraphs: int, seed: int = 0) -> str:
    """Sentences whose next word can partly be foretold, a few to a paragraph."""
    draw = random.Random(seed)
    nouns = ["cat", "river", "sailor", "letter", "garden", "horse", "window", "mountain"]
    verbs = ["sees", "follows", "remembers", "hides", "admires"]

    def sentence() -> str:
        subject, other = draw.sample(nouns, 2)
        return f"The {subject} {draw.choice(verbs)} the old {other}."

    return "\n\n".join(
        " ".join(sentence() for _ in range(draw.randint(1, 6))) for _ in range(paragraphs)
    )


@pytest.fixture(scope="module")
def texts() -> train.Texts:
    train_text = corpus.paragraphs(_text(300))
    tokenizer = train_tokenizer(train_text, SHORT.vocab_size)
    valid = batches.encode(tokenizer, corpus.paragraphs(_text(20, seed=1)))
    return train.Texts(tokenizer, batches.encode(tokenizer, train_text), valid, "made-up sentences")


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> tuple[Path, card.Record]:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    return folder, train.train_model("tiny", TINY, SHORT, texts, folder, CPU)


# The corpus


def test_paragraphs_are_split_at_blank_lines_and_normalised():
    text = "\ufeff“It’s\n  late,”\tshe said.\n \n\n\nNext one.\n\n   \n\n"
    assert corpus.paragraphs(text) == ['"It\'s late," she said.', "Next one."]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.xz"])
def test_a_corpus_is_read_plain_or_compressed(tmp_path, name):
    path = tmp_path / name
    opener = lzma.open if name.endswith(".xz") else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write("Déjà vu.\n")
    assert corpus.read_text(path) == "Déjà vu.\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.txt.xz", lzma.compress(b"words " * 999)[:-20], "not a whole xz file"),
        ("plain.txt.xz", b"no xz at all", "not a whole xz file"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
    ],
)
def test_an_unreadable_corpus_is_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AtlasError, match=expected) as error:
        corpus.read_text(path)
    assert str(path) in str(error.value)


def test_a_hub_data_set_gives_a_document_a_row(monkeypatch):
    rows = datasets.Dataset.from_dict({"body": ["One.\n\nTwo.", "Three."]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert corpus.paragraphs(corpus.read_hub("some/books", "body")) == ["One.", "Two.", "Three."]
    with pytest.raises(AtlasError, match=r"some/books: no column 'text', found body"):
        corpus.read_hub("some/books", "text")


def test_a_hub_data_set_that_cannot_be_reached_is_named(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AtlasError, match=r"some/books: cannot be loaded \(offline\)"):
        corpus.read_hub("some/books", "text")


# The tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoding_loses_nothing_and_adds_nothing(texts, text):
    wrapped = as_pretrained(texts.tokenizer, CONTEXT)
    ids = wrapped(text)["input_ids"]
    assert wrapped.decode(ids) == text
    if END_OF_TEXT not in text:
        assert wrapped.bos_token_id not in ids
        assert batches.token_bytes(texts.tokenizer)[ids].sum() == len(text.encode())


def test_the_same_text_gives_the_same_tokenizer(texts):
    again = train_tokenizer(corpus.paragraphs(_text(300)), SHORT.vocab_size)
    assert again.to_str() == texts.tokenizer.to_str()


def test_pieces_keep_words_clitics_digits_and_breaks_apart(texts):
    pieces = texts.tokenizer.pre_tokenizer.pre_tokenize_str("She's 'so' old,\n\n42  no")
    spelled = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]
    assert spelled == [
        *("She", "'s", " '", "so", "'", " old", ",", "\n\n", "4", "2", " ", " no"),
    ]


# Sequences


def test_encoding_marks_where_paragraphs_start(texts):
    paragraphs = corpus.paragraphs(_text(30))
    tokens = batches.encode(texts.tokenizer, paragraphs)
    ends = [*tokens.starts[1:], len(tokens.ids)]
    decoded = [
        texts.tokenizer.decode(tokens.ids[a:b].tolist())
        for a, b in zip(tokens.starts, ends, strict=True)
    ]
    assert decoded == [paragraph + "\n\n" for paragraph in paragraphs]


def test_a_cached_corpus_is_read_back_and_never_mistaken(texts, tmp_path):
    def cached(paragraphs):
        return batches.encode_cached(texts.tokenizer, paragraphs, tmp_path)

    first, second = corpus.paragraphs(_text(9)), corpus.paragraphs(_text(9, seed=5))
    for paragraphs in (first, second, first):
        expected = batches.encode(texts.tokenizer, paragraphs)
        found = cached(paragraphs)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.starts, expected.starts)
    assert len(list(tmp_path.iterdir())) == 2


@given(
    st.lists(st.integers(1, 90), min_size=40, max_size=120), st.integers(0, 2**31), st.just(CONTEXT)
)
def test_windows_begin_paragraphs_and_leave_nothing_between_them(lengths, seed, context):
    ends = np.cumsum(lengths)
    tokens = batches.Tokens(np.zeros(ends[-1], dtype=np.uint16), ends - lengths)
    windows = batches.window_starts(tokens, context, np.random.default_rng(seed))
    starts = set(tokens.starts.tolist())
    assert starts.issuperset(windows.tolist())
    assert windows[-1] + context <= ends[-1]
    for before, after in pairwise(windows):
        assert after > before
        # Only the rest of an overlong paragraph may be passed over.
        if after > before + context:
            assert not any(before < start < after for start in starts)


def test_batches_predict_the_window_from_the_text_before_it(texts):
    source = batches.training_batches(texts.train, CONTEXT, 4, seed=0)
    starts = set(texts.train.starts.tolist())
    for inputs, targets in islice(source, 5):
        assert inputs.shape == targets.shape == (4, CONTEXT)
        assert (inputs[:, 0] == 0).all()
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        for row in targets:
            windows = np.lib.stride_tricks.sliding_window_view(texts.train.ids, CONTEXT)
            assert starts & set(np.flatnonzero((windows == row).all(axis=1)).tolist())


def test_the_seed_fixes_the_order_and_each_pass_differs(texts):
    def taken(seed, count):
        source = batches.training_batches(texts.train, CONTEXT, 8, seed)
        return np.stack([targets for _, targets in islice(source, count)])

    np.testing.assert_array_equal(taken(0, 4), taken(0, 4))
    assert (taken(0, 4) != taken(1, 4)).any()
    generator = np.random.default_rng(0)
    first, second = (batches.window_starts(texts.train, CONTEXT, generator) for _ in range(2))
    assert set(first.tolist()) != set(second.tolist())


def test_evaluation_predicts_every_token_once():
    ids = np.arange(1, 12, dtype=np.uint16)
    inputs, targets = batches.evaluation_blocks(ids, context=4)
    np.testing.assert_array_equal(targets[targets != batches.IGNORED], ids)
    assert inputs[:2].tolist() == [[0, 1, 2, 3], [0, 5, 6, 7]]
    assert inputs[2, :3].tolist() == [0, 9, 10]
    assert batches.evaluation_blocks(ids, 4, stride=2)[1][:, 0].tolist() == [1, 9]


# Training


def test_the_learning_rate_rises_and_falls_to_zero():
    training = replace(SHORT, steps=1000)
    rates = [fit.learning_rate(step, 1.0, training) for step in range(1000)]
    assert training.warmup_steps == 100
    assert rates[0] == pytest.approx(1 / 101)
    assert max(rates) == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-5


def test_the_training_loss_is_the_models_own(texts):
    model = fit.build_model(TINY, SHORT)
    inputs, targets = next(batches.training_batches(texts.train, CONTEXT, 4, seed=0))
    found = fit.batch_loss(model, torch.from_numpy(inputs), torch.from_numpy(targets)).total
    logits = model(torch.from_numpy(inputs)).logits
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(targets)[..., None])
    assert found.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    found.backward()
    # The beginning of a text must learn: a padding token in the configuration would freeze it.
    assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0
    assert model.model.embed_tokens.padding_idx is None


def test_training_lowers_the_loss(trained):
    _, record = trained
    untrained = np.log(SHORT.vocab_size)
    assert record.curve[-1][0] == SHORT.steps
    assert record.valid.nats_per_token < untrained - 2
    assert record.train.nats_per_token == pytest.approx(record.valid.nats_per_token, abs=0.5)


def test_the_saved_folder_loads_and_has_the_recorded_loss(trained, texts):
    folder, record = trained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert model.config.tie_word_embeddings
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert specials == (END_OF_TEXT,) * 3
    assert (tokenizer.bos_token_id, model.config.bos_token_id, model.config.eos_token_id) == (
        0,
    ) * 3
    text = "\n\n".join(corpus.paragraphs(_text(20, seed=1))) + "\n\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == texts.valid.ids.tolist()
    nats = 0.0
    for first in range(0, len(ids), CONTEXT):
        block = ids[first : first + CONTEXT]
        logits = model(torch.tensor([[0, *block[:-1]]])).logits[0].double()
        nats -= logits.log_softmax(-1)[torch.arange(len(block)), block].sum().item()
    assert record.valid.tokens == len(ids)
    assert record.valid.nats_per_token == pytest.approx(nats / len(ids), rel=1e-5)
    assert record.valid.bits_per_byte == pytest.approx(nats / np.log(2) / len(text.encode()), 1e-5)


def test_the_same_seed_gives_the_same_weights(trained, texts, tmp_path):
    folder, record = trained
    again = train.train_model("tiny", TINY, SHORT, texts, tmp_path / "again", CPU)
    other = train.train_model("tiny", TINY, replace(SHORT, seed=1), texts, tmp_path / "other", CPU)
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights
    assert again.valid == record.valid != other.valid


def test_the_relu_twin_starts_from_the_same_weights():
    medium, twin = (recipe.architecture(name) for name in ("medium", "medium-relu"))
    assert twin == replace(medium, activation="relu")
    first, second = (
        fit.build_model(replace(TINY, activation=shape.activation), SHORT)
        for shape in (medium, twin)
    )
    assert (first.config.hidden_act, second.config.hidden_act) == ("silu", "relu")
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_diverging_training_stops_with_one_line(texts):
    model = fit.build_model(TINY, SHORT)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(AtlasError, match="diverged before step 2"):
        fit.fit(model, texts.train, TINY, replace(SHORT, steps=2), CPU)


def test_the_measured_loss_leaves_out_what_is_ignored():
    model = fit.build_model(TINY, SHORT)
    inputs = np.ones((1, 4), dtype=np.int64)
    targets = np.array([[5, 6, batches.IGNORED, batches.IGNORED]])
    sizes = np.full(SHORT.vocab_size, 3)
    found = loss.measure(model, inputs, targets, sizes)
    first_half = loss.measure(model, inputs[:, :2], targets[:, :2], sizes)
    assert (found.tokens, found.text_bytes) == (2, 6)
    assert found.nats == pytest.approx(first_half.nats, rel=1e-5)


# The command line


def _main(tmp_path: Path, **options: str) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(_text(60), encoding="utf-8")
    chosen = {
        "model": "small",
        "corpus": str(text),
        "valid": str(text),
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "tokenizer": str(ZOO / "small"),
        "steps": "1",
        "batch-tokens": "512",
        **options,
    }
    train.main([part for key, value in chosen.items() for part in (f"--{key}", value)])
    return tmp_path / "out"


def test_the_command_trains_a_named_model(tmp_path, capsys):
    prose = tmp_path / "prose.jsonl"
    prose.write_text('{"text": "Two words."}\n{"text": "Many more words than these."}\n')
    options = {"source": "Sixty paragraphs", "cache": str(tmp_path / "cache"), "prose": str(prose)}
    out = _main(tmp_path, **options)
    assert capsys.readouterr().out.startswith("small: train ")
    facts = json.loads((out / "small" / "training.json").read_text(encoding="utf-8"))
    assert facts["tokens_seen"] == 512
    assert facts["source"] == "Sixty paragraphs"
    assert 8 < facts["prose"]["tokens"] < 16
    assert "Sixty paragraphs" in (out / "small" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "huge"}, "--model: found 'huge', expected one of small, medium, large"),
        ({"corpus": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"valid": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"prose": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"steps": "0"}, "--steps: found 0"),
        ({"batch-tokens": "700"}, "--batch-tokens: found 700, expected a multiple of the context"),
        ({"tokenizer": "nowhere"}, "tokenizer.json: no such file"),
    ],
)
def test_bad_input_is_refused(tmp_path, options, expected):
    with pytest.raises(AtlasError) as refused:
        _main(tmp_path, **options)
    assert expected in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_corpus_too_small_for_the_tokenizer_or_a_window_is_refused(tmp_path, texts):
    with pytest.raises(AtlasError, match=r"too small, gives \d+ tokens, expected text enough"):
        train_tokenizer(["One short line."], 4096)
    few = batches.encode(texts.tokenizer, ["The cat sees."])
    with pytest.raises(AtlasError, match="too small"):
        next(batches.training_batches(few, CONTEXT, 1, seed=0))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n ", encoding="utf-8")
    with pytest.raises(AtlasError, match="--valid: no text in it"):
        train.run(
            train.parser().parse_args(
                ["--model", "small", "--corpus", str(empty), "--valid", str(empty), "--out", "out"]
            )
        )


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.choose_device("auto") == CPU
    with pytest.raises(AtlasError, match="--device: found cuda"):
        train.choose_device("cuda")


# What was trained

# Those with one folder each; of tiny there are several (`sparse/test_embedded.py`).
EMBEDDED = [name for name in recipe.ARCHITECTURES if name != "tiny"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_is_what_the_recipe_says(name):
    shape = recipe.architecture(name)
    facts = json.loads((ZOO / name / "training.json").read_text(encoding="utf-8"))
    assert recipe.described(facts["architecture"]) == shape
    assert recipe.Training(**facts["training"]) == recipe.Training()
    assert card.card(facts) == (ZOO / name / "README.md").read_text(encoding="utf-8")
    assert (ZOO / name / "model.safetensors").stat().st_size < 15e6
    weights = load_file(ZOO / name / "model.safetensors")
    counted = sum(tensor.numel() for tensor in weights.values())
    embedding = weights["model.embed_tokens.weight"].numel()
    assert counted == facts["total_parameters"]
    assert counted - embedding == shape.non_embedding_parameters
    tokenizer, shared = (
        json.loads((ZOO / one / "tokenizer.json").read_text(encoding="utf-8"))
        for one in (name, "large")
    )
    if isinstance(shape, recipe.MaskedDiffusion):
        assert tokenizer["added_tokens"].pop()["content"] == MASK
    assert tokenizer == shared


def test_the_embedded_models_are_small_enough_for_a_repository():
    sizes = [path.stat().st_size for path in ZOO.rglob("*") if path.is_file()]
    assert sum(sizes) < 64e6


def _facts() -> dict[str, dict]:
    return {
        name: json.loads((ZOO / name / "training.json").read_text(encoding="utf-8"))
        for name in EMBEDDED
    }


def test_the_embedded_sizes_span_a_factor_of_ten_and_loss_falls_with_size():
    facts = _facts()
    parameters = {name: found["non_embedding_parameters"] for name, found in facts.items()}
    assert parameters["large"] >= 10 * parameters["small"]
    losses = {name: found["valid"]["nats_per_token"] for name, found in facts.items()}
    assert losses["large"] < losses["medium"] - 0.1 < losses["small"] - 0.2
    assert losses["medium-relu"] == pytest.approx(losses["medium"], abs=0.05)


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_has_learnt_english(name):
    model = AutoModelForCausalLM.from_pretrained(ZOO / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ZOO / name)
    masks = tokenizer.mask_token_id is not None

    def score(sentence: str) -> float:
        ids = tokenizer(tokenizer.bos_token + sentence, return_tensors="pt")["input_ids"]
        if masks:
            targets = ids[:, 1:].numpy()
            sizes = np.ones(tokenizer.vocab_size)
            return -bound.measure(model, targets, sizes, tokenizer.mask_token_id, 256).nats
        with torch.inference_mode():
            return -model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    assert score("The old men were walking home.") > score("The old men was walking home.")
    assert score("She put on her hat and went out.") > score("She put on her hat and goed out.")
    nats = -score("He opened the door and looked into the room.")
    assert nats / len(b"He opened the door and looked into the room.") / np.log(2) < 1.6
