"""What a model's passes hold at once, as it was counted when the model was described.

Nothing heavy is imported, and no family is named: latent attention, state spaces and their scans, parallel
streams and experts all show in the count (`counting`), which knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a row beyond which its attention says what it takes.
LONG = 256


@dataclass(frozen=True)
class Counted:
    """Bytes beside weights and logits, in the type of the computation that they were counted in.

    Attributes:
        item: bytes of a number of that type.
        token: of each token of a pass.
        pair: of each pair of tokens of a row, as scores of attention take them.
        row: of each row.
        short: as `token` of short rows, where that is more: of what a layer does beside attention.
        short_pair: as `pair` of these.
        scored: as `token` when attention has its scores, which long rows come to.
        score: as `pair` then.
        filled: each row is filled up to a multiple of so many tokens.
        kept_token: of each token whose keys and values, or what there is in place of them, are kept.
        kept_row: of each row of these, as the state of a scan takes them.
    """

    item: int
    token: float
    pair: float = 0
    row: int = 0
    short: float = 0
    short_pair: float = 0
    scored: float = 0
    score: float = 0
    filled: int = 1
    kept_token: int = 0
    kept_row: int = 0

    def of_a_pass(self, tokens: int, longest: int, item: int) -> float:
        """Bytes of a pass over `tokens` in rows of `longest`, in a type of `item` bytes a number."""
        if not longest:
            return 0
        rows = -(-tokens // longest)
        length = -(-longest // self.filled) * self.filled
        # What is in float32 in any case is not known apart, so that a narrower type takes as much.
        wider = max(item / self.item, 1)
        filled = tokens * length / longest
        long = filled * (self.token + self.pair * length) + rows * self.row
        short = tokens * (self.short + self.short_pair * min(longest, LONG))
        scored = tokens * (self.scored + self.score * longest)
        return wider * max(long, short, scored)

    def of_what_is_kept(self, tokens: int, rows: int, item: int) -> float:
        """Bytes that generation keeps of `tokens` in `rows`."""
        return max(item / self.item, 1) * (tokens * self.kept_token + rows * self.kept_row)
