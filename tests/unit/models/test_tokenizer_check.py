"""Tokenizers of every kind are loaded; those that break a text, or are another model's, are refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load_tokenizer
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.models.tokenizer_check import SENTENCES, check_tokenizer
from tiny_lm import save_model, sentences, tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "<mask>"]
CORPUS = [*sentences(200), *SENTENCES * 3]


def folder_with(path: Path, **config: Any) -> Path:
    """A folder in which a tokenizer is looked for as in a model's."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        sentences(200),
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def word_piece(lowercase: bool) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
    )
    return made


def letters(alphabet: str) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    made.decoder = decoders.Fuse()
    return made


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        sentences(100), trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def checked(backend: Tokenizer, folder: Path, **options: Any) -> list[str]:
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)
    return check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000)


FOLDS, AROUND = "spaces that follow each other", "spaces around punctuation"
UNKNOWN = "characters that its vocabulary has not"
BEHIND = "behind a text, and so behind the context of a request, as in lm-eval"
NO_SPACES = "spaces or ends of lines that its vocabulary has not"


@pytest.mark.parametrize(
    ("make", "options", "notes"),
    [
        (byte_level, {}, []),
        (lambda: word_piece(True), {"unk_token": "[UNK]"}, ["lower case", FOLDS, AROUND]),
        (lambda: word_piece(False), {"unk_token": "[UNK]"}, [FOLDS, AROUND]),
        (words, {"unk_token": "[UNK]"}, [UNKNOWN, NO_SPACES]),
        (words, {}, [UNKNOWN, NO_SPACES]),
        (lambda: letters("ACGT"), {}, [UNKNOWN, NO_SPACES]),
        (lambda: letters("abcdefghijklmnopqrstuvwxyz '"), {}, [UNKNOWN, NO_SPACES]),
    ],
)
def test_what_a_tokenizer_does_on_purpose(
    make: Callable[[], Tokenizer], options: dict[str, str], notes: list[str], tmp_path: Path
) -> None:
    assert sorted(checked(make(), tmp_path, **options)) == sorted(notes)


def test_the_class_replaces_a_part_of_the_file(tmp_path: Path) -> None:
    """Byte-level BPE under a class that is SentencePiece's: spaces are lost, and nothing says so."""
    folder = folder_with(tmp_path, tokenizer_class="CodeLlamaTokenizer")
    byte_level().save(str(folder / "tokenizer.json"))
    broken = load_tokenizer(Checkpoint(folder))
    ids = broken("the old cat", add_special_tokens=False)["input_ids"]
    assert broken.decode(ids).replace("<unk>", "") == "theoldcat"
    says = "it loses the spaces of 'The old cat .* tokenizer.json by itself does not: transformers"
    with pytest.raises(AtlasError, match=says):
        check_tokenizer(broken, folder, 10_000)
    folder_with(tmp_path, tokenizer_class="TokenizersBackend")
    assert check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000) == []
    # Saved as it was loaded, its own file is broken as well.
    again = folder_with(tmp_path / "again")
    broken.save_pretrained(again)
    with pytest.raises(
        AtlasError, match=r"it loses the spaces .* `tokenizer` in the model's entry"
    ):
        check_tokenizer(load_tokenizer(Checkpoint(again)), again, 10_000)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_classes_that_keep_it(name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_class=name)
    byte_level().save(str(folder / "tokenizer.json"))
    assert check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000) == []


def test_a_missing_decoder(tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = decoders.Fuse()
    with pytest.raises(
        AtlasError, match=r"it adds 'Ġ' to 'The old cat .*, and breaks 5 other texts"
    ):
        checked(backend, tmp_path)


def test_letters_that_are_lost(tmp_path: Path) -> None:
    """A normaliser that drops what the vocabulary has."""
    backend = byte_level()
    backend.normalizer = normalizers.Replace("cat", "c")
    with pytest.raises(AtlasError, match="it loses 'a', 't' of 'The old cat"):
        checked(backend, tmp_path)


def test_other_tokens_than_the_files(tmp_path: Path) -> None:
    """The text comes back, but by other tokens: said, since some classes do so on purpose."""
    folder = folder_with(tmp_path, tokenizer_class="Qwen2Tokenizer")
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(folder / "tokenizer.json"))
    notes = check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000)
    assert notes == ["other tokens than those of tokenizer.json by itself"]


def test_a_vocabulary_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of the first Qwen, whose code is its repository's own."""
    tokenizer = ByT5Tokenizer()
    own = {bytes([byte]): byte + 3 for byte in range(256)}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: own)
    assert check_tokenizer(tokenizer, tmp_path, 300) == [f"'</s>' {BEHIND}"]


# Tokens and rows of the embedding


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cat", "bird"])
    tokenizer.save_pretrained(folder)
    says = "token 'cat' has id 300, but the model's embedding has 300 rows, and 1 more have none"
    with pytest.raises(AtlasError, match=says):
        describe(Checkpoint(folder), None)


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "bos_token"])
def test_special_tokens_beyond_the_embedding(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path)
    notes = check_tokenizer(load_tokenizer(Checkpoint(tmp_path)), tmp_path, 300)
    assert notes == ["1 special tokens without a row in the embedding"]
    tokenizer.add_special_tokens({name: "<other>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AtlasError, match="token '<other>' has id 301"):
        check_tokenizer(load_tokenizer(Checkpoint(tmp_path)), tmp_path, 300)


# Files of every kind


def piece_model(folder: Path, kind: str) -> None:
    """Train SentencePiece's own kind of model."""
    text = folder / "corpus.txt"
    text.write_text("\n".join(" ".join(one.split()) for one in CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        # As those of Llama: nothing is folded, and what is not known is written as bytes.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        vocab_size=365,
        minloglevel=2,
    )


FIRST = "spaces at the beginning or the end"
OTHER = "other tokens than those of tokenizer.model by itself"


@pytest.mark.parametrize(
    ("kind", "name", "notes"),
    [
        ("bpe", "LlamaTokenizer", {FIRST, OTHER}),  # which drops spaces at the beginning
        ("bpe", None, set()),
        ("bpe", "GemmaTokenizer", {OTHER}),  # which puts no space first
        ("unigram", None, set()),
        ("unigram", "LlamaTokenizer", {FIRST, OTHER}),  # which takes it for BPE
    ],
)
def test_sentencepiece_alone(kind: str, name: str | None, notes: set[str], tmp_path: Path) -> None:
    folder = folder_with(tmp_path, **({"tokenizer_class": name} if name else {}))
    piece_model(folder, kind)
    assert set(check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000)) == notes


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_without_files(name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_class=name)
    (note,) = check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 2_000_000)
    assert note.endswith(BEHIND)


def test_tiktoken_is_read_anew(tmp_path: Path) -> None:
    """The library remembers a file by its path, whatever is in it later."""
    folder = folder_with(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    path = folder / "tiktoken.model"
    ids = []
    for order in (range(256), reversed(range(256))):
        lines = [
            f"{base64.b64encode(bytes([byte])).decode()} {rank}" for rank, byte in enumerate(order)
        ]
        path.write_text("\n".join(lines) + "\n")
        tokenizer = load_tokenizer(Checkpoint(folder))
        assert check_tokenizer(tokenizer, folder, 10_000) == []
        ids.append(tokenizer("a", add_special_tokens=False)["input_ids"])
    assert ids == [[97], [158]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token_id": 0, "eos_token_id": 2}, "<pad>"),
        ({"eos_token_id": [2, 1]}, "</s>"),
        ({"pad_token_id": None, "bos_token_id": 1}, "<s>"),
        ({"eos_token_id": 5000}, None),
    ],
)
def test_padding_of_a_tokenizer_file_alone(
    config: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    """The model's own, since lm-eval would add a token without a row in the embedding."""
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    loaded = load_tokenizer(Checkpoint(tmp_path))
    assert loaded.pad_token == expected
    assert len(loaded) == 300


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "gemma", "t5", "byt5"])
def test_no_tokenizer(kind: str, tmp_path: Path) -> None:
    """transformers makes one of a few special tokens then, and encodes every text as nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(AtlasError, match=r"expected .*tokenizer.json.*, found none"):
        load_tokenizer(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer: "),
        ("tokenizer.json", "not json", "tokenizer.json: Expecting value"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "tokenizer.json: not a tokenizer: "),
        (
            "tokenizer_config.json",
            "[]",
            "tokenizer_config.json: expected a JSON object, found list",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "TypeError: "),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 3}}', "TypeError: "),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: expected a JSON object"),
        ("added_tokens.json", "{", "added_tokens.json: Expecting property name"),
        ("chat_template.jinja", "\udcff", "chat_template.jinja: 'utf-8' codec can't decode"),
    ],
)
def test_a_damaged_tokenizer(name: str, content: str, says: str, tmp_path: Path) -> None:
    """Whoever reads a file says what he found, and not where."""
    tiny_tokenizer().save_pretrained(folder_with(tmp_path))
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(AtlasError, match=f"cannot load the tokenizer: {says}"):
        load_tokenizer(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        ("<s> $A", []),
        ("<s> <s> $A", ["'<s>', '<s>' before a text; captured texts begin without"]),
        ("<mask> <bos> $A", ["'<mask>', '<bos>' before a text; captured texts begin without"]),
        ("<s> $A </s>", [f"'</s>' {BEHIND}"]),
    ],
)
def test_what_is_put_around_a_text(template: str, notes: list[str], tmp_path: Path) -> None:
    backend = byte_level()
    signs = set(template.split()) - {"$A"}
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(sign, backend.token_to_id(sign)) for sign in signs]
    )
    assert checked(backend, tmp_path, bos_token="<s>", eos_token="</s>") == notes


def test_a_class_that_cannot_encode(tmp_path: Path) -> None:
    """It is loaded, and fails at the first text."""
    folder = folder_with(tmp_path, tokenizer_class="BertTokenizer")
    byte_level().save(str(folder / "tokenizer.json"))
    with pytest.raises(AtlasError, match=r"tokenizer \(BertTokenizer\): it fails: .*UNK"):
        check_tokenizer(load_tokenizer(Checkpoint(folder)), folder, 10_000)


@pytest.mark.parametrize(
    "change", [{"model_max_length": "x"}, {"tokenizer_class": "BertTokenizer"}]
)
def test_the_manifest_is_not_written_with_it(change: dict, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AtlasError, match=r"tokenizer \(\w+\): it fails: "):
        describe(Checkpoint(folder), None)


def test_another_folders_tokenizer_is_used(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "words")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(AtlasError, match=r"expected .*tokenizer.json.*, found none"):
        describe(Checkpoint(folder), None)
    found = describe(Checkpoint(folder, tokenizer=tmp_path / "words"), None)["tokenizer"]
    assert found == {
        **{"class": "TokenizersBackend", "tokens": 300, "begins_with_bos": True, "changes": []}
    }


def test_the_manifest_says_what_is_changed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    PreTrainedTokenizerFast(
        tokenizer_object=word_piece(True), unk_token="[UNK]", bos_token="[UNK]"
    ).save_pretrained(folder)
    found = describe(Checkpoint(folder), None)["tokenizer"]
    assert found["changes"] == ["lower case", FOLDS, AROUND]
    assert found["begins_with_bos"] is False
