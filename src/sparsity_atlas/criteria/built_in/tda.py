"""TDA: the neurons that exceed the layer's CETT threshold over a prompt, for everything after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from sparsity_atlas.criteria.built_in.cett import Cett
from sparsity_atlas.criteria.built_in.prompt_mask import PromptMask
from sparsity_atlas.kernels.definition import square_root
from sparsity_atlas.kernels.prompts import sequence_sums

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.place import Place, Sample
    from sparsity_atlas.criteria.reach import Reach


class Tda(PromptMask):
    """Keep, after the prompt, the neurons whose output is large over it (TDA, arXiv 2408.11393).

    A neuron is kept if the root mean square over the prompt of |i_j| · ‖W_d[:, j]‖₂ reaches the ε
    that gives the layer the CETT that is the level, token by token, on the calibration text. (The
    mean, so that a prompt's length changes nothing.) What is a prompt: see `PromptMask`.
    level = 0 changes nothing, level = 1 drops everything after the prompt. `after: own`: see there; a
    token's own neurons are those with the largest |i_j| · ‖W_d[:, j]‖₂.
    """

    sites = ("intermediate",)
    calibrated = True
    not_in_experts = "it looks at whole sequences, of which an expert sees some tokens"
    dense_level = 0.0
    coarse_levels = ("0.05", "0.1", "0.2", "0.4")
    _cett: Cett

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """See `Criterion.calibrate`."""
        return Cett().calibrate(place, sample)

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        bound = type(self)(self.prompt_share, self.after)
        bound._cett = Cett().bind(place, state)
        return bound

    def reach(self, state: dict[str, Tensor], level: float) -> Reach | None:
        """See `Criterion.reach`."""
        return Cett().reach(state, level)

    def neurons(self, prompt: Tensor, counted: Tensor, level: float) -> Tensor:
        """See `PromptMask.neurons`."""
        squares = sequence_sums.over_tokens(prompt, counted.double())
        rms = square_root(squares / counted.sum(1, keepdim=True))
        return self._cett.mask(rms, level)

    def scores(self, values: Tensor) -> Tensor:
        """See `PromptMask.scores`."""
        return values.float().abs() * self._cett.norms

    def export(self, level: float) -> dict[str, Tensor]:
        """See `Criterion.export`; here the root mean square over the prompt is compared."""
        return self._cett.export(level)
