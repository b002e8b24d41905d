"""Whether sequences begin with BOS: decided here, for capture and evaluation alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More than a letter: a tokenizer may know no letter, or give for it the token that is also its BOS.
_TEXT = "The 1st of a few words."


def begins_with_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> bool:
    """Whether sequences begin with the BOS token: as configured, else as the tokenizer does by itself.

    Args:
        tokenizer: as `pretrained.load_tokenizer` loads it for `wanted`.
        wanted: `add_bos_token` of the model's entry.

    Raises:
        AtlasError: BOS is asked for, and the tokenizer has none or does not put it.
    """
    if wanted is False:
        return False
    puts = _puts_bos(tokenizer)
    if wanted and not puts:
        reason = (
            "the tokenizer has no BOS token (bos_token in tokenizer_config.json)"
            if tokenizer.bos_token_id is None
            else f"{type(tokenizer).__name__} puts no BOS token before a text"
        )
        raise AtlasError(f"{tokenizer.name_or_path}: add_bos_token: true found, but {reason}")
    return puts


def put_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before a text, and those behind it."""
    bare = tokenizer.encode(_TEXT, add_special_tokens=False)
    whole = tokenizer.encode(_TEXT)
    # The last place: the text's own first token may be BOS, too. In GPT-2 it also stands for what is unknown.
    for place in range(len(whole) - len(bare), -1, -1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token, and no other, before what a text comes to."""
    bos = tokenizer.bos_token_id
    return bos is not None and put_around(tokenizer)[0] == [bos]
