"""How levels are searched for, in the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from sparsity_atlas.config.strict import Strict, some

# Levels that bracket a further bar beside the headline's, at most.
FURTHER_LEVELS = 3
Percent = Annotated[float, Field(gt=0, lt=100)]


class SearchSettings(Strict):
    """How `levels: auto` chooses levels."""

    max_levels: int = Field(default=6, ge=2, le=64)
    """Levels evaluated at most, for each model, criterion and site; up to three more for each further p of
    `ppl`."""
    resolution: float = Field(default=0.01, gt=0, lt=1)
    """Stop when the induced sparsity at the headline bar is bracketed this closely (0.01: a point); from six
    levels on, three times as wide a bracket will do."""
    ppl: Annotated[list[Percent], AfterValidator(some)] | None = None
    """Every p of PPL-p% that levels are searched for, in percent of perplexity, for instance `[1, 5, 10]`; by
    accuracy the share of it that may be lost. The headline's, 1, always is. Each is one of `bars`, too."""

    @property
    def further(self) -> tuple[float, ...]:
        """The bars beside the headline's that levels are searched for, the mildest first."""
        return tuple(round(1 - p / 100, 10) for p in sorted(self.ppl or ()) if p != 1)

    @property
    def most_levels(self) -> int:
        """Levels evaluated at most."""
        return self.max_levels + FURTHER_LEVELS * len(self.further)
