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
        tokenizer: as `loading.load_tokenizer` loads it for `wanted`.
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


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before what a text comes to."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    bare = tokenizer.encode(_TEXT, add_special_tokens=False)
    # The text's own first token may be the same: in GPT-2 BOS also stands for what is unknown.
    return tokenizer.encode(_TEXT)[: len(bare) + 1] == [bos, *bare]
