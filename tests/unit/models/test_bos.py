"""One decision about BOS, with every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load_tokenizer
from sparsity_atlas.models.bos import begins_with_bos
from tiny_lm import tiny_tokenizer

BOS, EOS = 1, 2


def words(
    vocabulary: dict[str, int], single: str | None, **special: str
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts special tokens as `single` says.

    Without a token for what is unknown, unknown letters come to nothing.
    """
    known = {"<s>": 1, **vocabulary}
    unknown = special.get("unk_token")
    model = models.WordLevel(known, unk_token=unknown) if unknown else models.BPE(known, [])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if single is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Checkpoint:
    tokenizer.save_pretrained(folder)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        *((False, None, False), (False, True, True), (False, False, False)),
        *((True, None, True), (True, True, True), (True, False, False)),
    ],
)
def test_as_configured_else_as_the_tokenizer_does(
    tmp_path: Path, own: bool, wanted: bool | None, expected: bool
) -> None:
    checkpoint = saved(tiny_tokenizer(bos=own), tmp_path)
    tokenizer = load_tokenizer(checkpoint, add_bos_token=wanted)
    assert begins_with_bos(tokenizer, wanted) is expected
    if wanted is not False:
        assert (tokenizer.encode("the cat")[0] == BOS) is expected
        assert tokenizer.encode("the cat").count(BOS) == int(expected)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        # Every word is unknown, and what stands for it is BOS as well, as in GPT-2.
        (words({}, None, unk_token="<s>", bos_token="<s>"), False),
        (words({}, "<s> $A", unk_token="<s>", bos_token="<s>"), True),
        # No word comes to anything.
        (words({}, None, bos_token="<s>"), False),
        (words({}, "<s> $A", bos_token="<s>"), True),
        # What is put at the end is BOS as well.
        (words({"The": 0}, "$A <s>", unk_token="<s>", bos_token="<s>", eos_token="<s>"), False),
        # No fast tokenizer; it puts an end, but no beginning.
        (ByT5Tokenizer(bos_token="<s>"), False),
        (ByT5Tokenizer(), False),
    ],
)
def test_what_a_tokenizer_does_by_itself(
    tokenizer: PreTrainedTokenizerBase, expected: bool
) -> None:
    assert begins_with_bos(tokenizer, None) is expected


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (ByT5Tokenizer(bos_token="<s>"), "ByT5Tokenizer puts no BOS token before a text"),
        (
            words({"The": 0, "of": 1, "a": 2}, None, unk_token="The"),
            "the tokenizer has no BOS token",
        ),
    ],
)
def test_bos_that_cannot_be_put_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, message: str
) -> None:
    checkpoint = saved(tokenizer, tmp_path)
    loaded = load_tokenizer(checkpoint, add_bos_token=True)
    with pytest.raises(AtlasError, match=f"add_bos_token: true found, but {message}"):
        begins_with_bos(loaded, True)
