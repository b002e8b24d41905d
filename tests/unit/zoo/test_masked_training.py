"""The masked-diffusion recipe: its masks, its loss, which is the bound that is measured, and its folder."""

import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsity_atlas.diffusion.mask_sets import mask_sets
from sparsity_atlas.models.causality import kind_of, mask_token_of
from sparsity_atlas.zoo import batches, bound, card, fit, masked_training, recipe, train
from sparsity_atlas.zoo.batches import IGNORED
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT, MASK, as_pretrained, train_tokenizer

CONTEXT = 32
TINY = recipe.MaskedDiffusion(width=32, layers=2, ffn_width=48, learning_rate=1e-2)
SHORT = recipe.Training(steps=60, batch_tokens=8 * CONTEXT, context=CONTEXT, vocab_size=320)
MASK_ID = 320
PARAGRAPHS = [
    f"The {a} sees the old {b}. It hides." for a in ("cat", "dog", "owl") for b in ("sea", "mill")
]


@pytest.fixture(scope="module")
def texts() -> train.Texts:
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ark", "ill", "ost", "une")]
    spelled = [" ".join(rng.choice(words, 6)) for _ in range(60)]
    paragraphs = [*PARAGRAPHS * 20, *spelled]
    tokenizer = train_tokenizer(paragraphs, SHORT.vocab_size)
    valid = batches.encode(tokenizer, PARAGRAPHS * 2)
    prose = tuple(batches.encode(tokenizer, [one]).ids for one in PARAGRAPHS[:2])
    return train.Texts(tokenizer, batches.encode(tokenizer, paragraphs), valid, "made up", prose)


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    return folder, train.train_model("tiny", TINY, SHORT, texts, folder, torch.device("cpu"))


def _source(texts, seed=0, **changed):
    options = {"mask_token": MASK_ID, "short_texts": 0.25, **changed}
    return masked_training.masked_batches(texts.train, CONTEXT, 8, seed, **options)


def _whole(batch: masked_training.MaskedBatch) -> np.ndarray:
    return np.where(batch.targets == IGNORED, batch.inputs, batch.targets)


# What is masked, among which others


def test_a_causal_twin_reads_the_same_windows(texts):
    causal = batches.training_batches(texts.train, CONTEXT, 8, seed=0)
    for (inputs, _), batch in islice(zip(causal, _source(texts), strict=False), 4):
        np.testing.assert_array_equal(_whole(batch)[:6], inputs[:6])  # the others are cut
        assert not batch.text[:6].any()


def test_masks_are_of_tokens_and_the_targets_what_they_hide(texts):
    for batch in islice(_source(texts), 4):
        masked = batch.inputs == MASK_ID
        np.testing.assert_array_equal(masked, batch.targets != IGNORED)
        assert not (batch.targets == 0).any()
        counts = masked.sum(axis=1)
        assert counts.min() >= 1
        lengths = (_whole(batch) != 0).sum(axis=1)
        np.testing.assert_allclose(batch.weights, lengths / counts / lengths.sum(), rtol=1e-6)
        # Evenly spaced: once in each eighth of a row's length, but for rounding.
        shares = np.sort((counts - 0.5) / lengths)
        np.testing.assert_allclose(shares, (np.arange(8) + 0.5) / 8, atol=1 / 16 + 1 / 20)


def test_short_texts_begin_where_a_paragraph_does(texts):
    ends = 0
    for batch in islice(_source(texts, short_texts=1.0), 6):
        for row, text in zip(_whole(batch), batch.text, strict=True):
            assert np.diff(text).min() >= 0
            for place in np.flatnonzero(row == 0):
                assert place == 0 or text[place] == text[place - 1] + 1
                ends += place > 0
    assert ends > 50
    ids = np.array([[0, 5, 6, 7, 8, 9]])
    first = np.array([[False, False, False, True, False, False]])
    generator = np.random.default_rng(0)
    found = masked_training.cut(ids, first, 1, generator)
    assert found.ids.tolist() == [[0, 5, 6, 0, 8, 9]]
    assert found.text.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_some_short_texts_end_within_a_sentence():
    ids = np.full((64, 512), 5)
    found = masked_training.cut(ids, np.zeros(ids.shape, bool), 0, np.random.default_rng(0))
    assert found.text[:, -1].mean() == pytest.approx(512 / masked_training.CUT_ONCE_IN, rel=0.2)
    untouched = masked_training.cut(ids, np.zeros(ids.shape, bool), 64, np.random.default_rng(0))
    assert not untouched.text.any()


def test_the_seed_fixes_the_masks(texts):
    first, again, other = (next(_source(texts, seed)) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.inputs != other.inputs).any()


# The loss


def test_the_loss_is_the_weighted_mean_over_masked_tokens_by_hand(texts):
    model = fit.build_model(TINY, SHORT)
    batch = next(_source(texts, short_texts=0.0))
    found = masked_training.masked_loss(model, *map(torch.from_numpy, batch)).item()
    logits = model(torch.from_numpy(batch.inputs)).logits.log_softmax(-1).detach().numpy()
    means, lengths = [], []
    for row, targets in zip(logits, batch.targets, strict=True):
        places = np.flatnonzero(targets != IGNORED)
        means.append(-row[places, targets[places]].mean())
        lengths.append(CONTEXT - 1)
    assert found == pytest.approx(np.average(means, weights=lengths), rel=1e-5)


def test_each_text_of_a_row_is_read_as_if_alone(texts):
    model = fit.build_model(TINY, SHORT)
    batch = next(_source(texts, short_texts=1.0))
    one = masked_training.MaskedBatch(*(part[:1] for part in batch))
    found = masked_training.masked_loss(model, *map(torch.from_numpy, one)).item()
    expected = 0.0
    for number in range(one.text.max() + 1):
        own = one.text[0] == number
        ids, targets = one.inputs[:, own], one.targets[0, own]
        logits = model(torch.from_numpy(ids)).logits[0].log_softmax(-1).detach().numpy()
        places = np.flatnonzero(targets != IGNORED)
        expected -= one.weights[0] * logits[places, targets[places]].sum()
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_in_the_mean_the_bound(texts):
    """Of every text of a row: a batch of one row, drawn often, against all sets of masked tokens."""
    model = fit.build_model(TINY, SHORT)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # so that it depends on what is masked
    rows = 3000
    ids = np.tile([[0, 5, 9, 7, 0, 11, 8, 6]], (rows, 1))
    text = np.tile([[0, 0, 0, 0, 1, 1, 1, 1]], (rows, 1))
    drawn = masked_training.masked(
        masked_training.Texts(ids, text), MASK_ID, np.random.default_rng(0)
    )
    with torch.no_grad():
        found = masked_training.masked_loss(model, *map(torch.from_numpy, drawn)).item()
    expected = 0.0
    for whole in (ids[0, :4], ids[0, 4:]):
        sets = mask_sets(3, 100, "0")
        assert sets.exact
        for masked, weight in zip(sets.masked, sets.weights, strict=True):
            shown = torch.from_numpy(np.append(0, np.where(masked, MASK_ID, whole[1:])))[None]
            with torch.no_grad():
                likely = model(shown).logits[0, 1:].log_softmax(-1).numpy()
            expected -= weight * likely[masked, whole[1:][masked]].sum()
    assert found == pytest.approx(expected / 6, rel=0.02)


def test_it_starts_from_the_weights_of_its_causal_twin():
    medium, twin = (recipe.architecture(name) for name in ("medium", "medium-diffusion"))
    shared = {name: getattr(twin, name) for name in medium.__dataclass_fields__}
    assert medium == recipe.Architecture(**shared)
    causal = fit.build_model(recipe.Architecture(**{**shared, "width": 32, "layers": 2}), SHORT)
    masks = fit.build_model(replace(twin, width=32, layers=2), SHORT)
    theirs = dict(causal.named_parameters())
    for name, ours in masks.named_parameters():
        torch.testing.assert_close(ours[: len(theirs[name])], theirs[name], rtol=0, atol=0)
    assert masks.model.embed_tokens.weight[MASK_ID].abs().sum() > 0


# What comes out


def test_training_lowers_the_bound(trained):
    _, record = trained
    assert record.curve[-1][0] == SHORT.steps
    assert isinstance(record.valid, bound.Bound)
    assert record.valid.nats_per_token < math.log(SHORT.vocab_size) - 2
    assert 0 < record.valid.standard_error < 0.5


def test_the_folder_is_a_diffusion_model_with_the_recorded_bound(trained, texts):
    folder, record = trained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert kind_of(model) == "diffusion"
    assert mask_token_of(model) == MASK_ID
    assert model.config.vocab_size == MASK_ID + 1
    assert type(model).__name__ == "LlamaForCausalLM"
    targets = batches.evaluation_blocks(texts.valid.ids, CONTEXT - 1)[1]
    sizes = batches.token_bytes(texts.tokenizer)
    assert bound.measure(model, targets, sizes, MASK_ID) == record.valid
    assert record.valid.tokens == len(texts.valid.ids)


def test_the_bound_is_that_of_every_set_where_these_are_few(texts):
    model = fit.build_model(TINY, SHORT)
    targets = np.array([[5, 6, 7], [8, 9, IGNORED]])
    found = bound.measure(model, targets, np.full(MASK_ID, 3), MASK_ID)
    nats = []
    for block in ([5, 6, 7], [8, 9]):
        sets, total = mask_sets(len(block), 8, "0"), 0.0
        for masked, weight in zip(sets.masked, sets.weights, strict=True):
            shown = torch.tensor([[0, *np.where(masked, MASK_ID, block).tolist()]])
            with torch.no_grad():
                likely = model(shown).logits[0, 1:].log_softmax(-1).numpy()
            total -= weight * likely[masked, np.array(block)[masked]].sum()
        nats.append(total)
    assert (found.tokens, found.text_bytes) == (5, 15)
    assert found.nats == pytest.approx(sum(nats), rel=1e-5)
    rest = np.array(nats) - np.array([3, 2]) * sum(nats) / 5
    assert found.standard_error == pytest.approx(math.sqrt(2 * (rest @ rest)) / 5, rel=1e-4)


def test_its_tokenizer_is_the_zoos_and_the_mask(trained, texts):
    folder, _ = trained
    twin = as_pretrained(texts.tokenizer, CONTEXT)
    ours = AutoTokenizer.from_pretrained(folder)
    assert (ours.mask_token, ours.mask_token_id) == (MASK, MASK_ID)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (END_OF_TEXT,) * 3
    for text in (*PARAGRAPHS, "  d\u00e9j\u00e0 vu\n\n"):
        assert ours(text)["input_ids"] == twin(text)["input_ids"]
    assert texts.tokenizer.get_vocab_size() == SHORT.vocab_size  # it has not got the mask


def test_the_card_says_what_was_trained_and_the_bound(trained):
    folder, _ = trained
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert recipe.described(facts["architecture"]) == TINY
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card.card(facts)
    for key in ("valid", "train", "prose"):
        assert f"{facts[key]['nats_per_token']:.4f} | {facts[key]['standard_error']:.4f}" in text
    assert "`<|mask|>` (token 320)" in text
    assert "masked-diffusion language model" in text
    assert "blocks of 31 tokens" in text


def test_documents_are_measured_each_by_itself(texts, trained):
    _, record = trained
    assert record.prose is not None
    assert record.prose.tokens == sum(map(len, texts.prose))
