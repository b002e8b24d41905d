"""Where a text that is generated ends, token by token, as lm-eval's stopping criteria have it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lm_eval.models.utils_hf import stop_sequences_criteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ends:
    """Stop strings and end tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: list[str], tokens: Collection[int]
    ) -> None:
        """Take what ends a text.

        Args:
            tokenizer: of the model.
            stops: strings.
            tokens: end tokens.
        """
        self._tokenizer, self._tokens = tokenizer, tokens
        # How far each string is looked for is lm-eval's to say.
        self._stops: dict[int, list[str]] = {}
        for stop in stop_sequences_criteria(tokenizer, stops, 0, 1):
            self._stops.setdefault(stop.sequence_id_len, []).append(stop.sequence)

    def met(self, tokens: list[int]) -> bool:
        """Whether a text ends with its last token.

        Args:
            tokens: that were generated so far, one at least.
        """
        if tokens[-1] in self._tokens:
            return True
        for reach, stops in self._stops.items():
            text = self._tokenizer.decode(tokens[-reach:])
            if any(stop in text for stop in stops):
                return True
        return False
