"""The zoo's tokenizer: byte-level BPE, so that any text can be encoded and is decoded unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo.corpus import PARAGRAPH_BREAK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Begins every sequence, and serves as end and padding too.
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
# Stands for a token that is to be filled in; no text has it, and the tokenizer was not trained with it.
MASK = "<|mask|>"

# Word pieces never cross these: an English clitic, a word, one digit, a run of punctuation,
# line breaks, other space. A single space belongs to the word that follows it.
_PIECES = (
    r"'(?:[sdmt]|ll|re|ve)(?!\p{L})"
    r"| ?\p{L}+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\n+"
    r"|[^\S\n]+(?!\S)"
    r"|\s"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens from paragraphs; the same paragraphs give the same tokenizer.

    AtlasError when the text holds too few different words for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text + PARAGRAPH_BREAK for text in texts), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise AtlasError(
            f"--corpus: too small, gives {found} tokens, expected text enough for {vocab_size}"
        )
    return tokenizer


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Read `tokenizer.json` of a model folder; AtlasError unless it has `vocab_size` tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise AtlasError(f"{path}: no such file, expected the folder of a trained tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    found = tokenizer.get_vocab_size()
    if found != vocab_size or tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise AtlasError(
            f"{path}: {found} tokens, expected {vocab_size} with {END_OF_TEXT} as the first"
        )
    return tokenizer


def as_pretrained(
    tokenizer: Tokenizer, context: int, *, masks: bool = False
) -> PreTrainedTokenizerFast:
    """Wrap for transformers: special tokens named, none added on its own when encoding.

    With `masks` there is one more, `MASK`, behind all that the tokenizer has.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK if masks else None,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
