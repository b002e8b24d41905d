"""What a criterion is: the rule that decides which entries of a vector are kept."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sparsity_atlas.criteria.in_experts import why_not

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.criteria.dense_prompt import DensePrompt
    from sparsity_atlas.criteria.place import Place, Sample
    from sparsity_atlas.criteria.reach import Reach
    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.terms import Phase


class Criterion(ABC):
    """Decides, for each token's vector by itself, which entries are kept.

    A criterion is one file with one subclass. Its one number, the level, lies in [lowest, highest].
    Parameters of the criterion are the keyword arguments of `__init__`. It says what it does in one
    of two ways:

    - `threshold` returns a `Threshold`: a share of the mass, a rank, a share of the largest, or fixed
      constants, of scores that may be weighted by channel. The plain torch definition and the compiled
      kernels both follow from it.
    - `mask` computes the mask in plain torch, exactly. It then is the only path, on every device.

    A criterion whose numbers differ from layer to layer (calibrated constants, weights taken from the
    model) overrides `bind`, which is asked once for each layer and tensor before anything runs. The
    constants below stand in its own file, as plain literals: they are read without running it.

    Rules that every criterion keeps: thresholds look at one row only, never across a batch; ties at
    a threshold are kept; NaN and infinities need no care here, they are reported by the caller.
    """

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    dense_level: ClassVar[float]
    """The level at which nothing changes; sparsity grows with the distance from it."""
    coarse_levels: ClassVar[tuple[str, ...]]
    """Where a search begins and what it goes on with until the bar is passed, from mild to harsh, spread
    over the useful range."""
    sites: ClassVar[tuple[str, ...]] = ()
    """The sites where the rule means something; empty: all of them."""
    calibrated: ClassVar[bool] = False
    """Whether `bind` needs what `calibrate` found in the captured activations."""
    looks_at_weights: ClassVar[bool | None] = None
    """Whether what `bind` makes of a place follows from the weights there, so that each expert of a mixture
    has a rule of its own; None: it may, if there is a `bind`."""
    by_channel: ClassVar[bool] = False
    """Whether `calibrate` finds numbers of single channels, which mean nothing over several experts."""
    not_in_experts: ClassVar[str] = ""
    """Why the rule does not work inside routed experts; empty: it does."""
    file: str | None = None
    """The user's file that the rule stands in; None: it is built in."""
    tried: bool = False
    """Whether the masks of a user's rule were tried as they are bound."""
    allocation: str = "uniform"
    """How a level is spread over a site's places; other than uniform, their states say: `allocation`."""
    calibration: str = "per_layer"
    """Whose rows of a mixture are calibrated together, one of `terms.CALIBRATIONS`."""
    expert_rows: int = 128
    """Rows that an expert must have in a calibration to get a state of its own."""
    dense_prompt: DensePrompt | None = None
    """What stays dense of each prompt; None: nothing."""

    @property
    def sees_sequences(self) -> bool:
        """Whether what is kept of a token depends on others that it is run with, or on its place there."""
        return self.dense_prompt is not None

    @property
    def differs_by_expert(self) -> bool:
        """Whether each expert of a mixture has a rule of its own; else one serves all of a layer's."""
        if self.calibration == "per_expert":
            return True
        if self.looks_at_weights is None:
            return type(self).bind is not Criterion.bind
        return self.looks_at_weights

    def refuses(self, place: Place) -> str | None:
        """Why the rule cannot work at a place of a model; None: it can."""
        constants = {"not_in_experts": self.not_in_experts, "by_channel": self.by_channel}
        chosen: dict[str, Any] = {"calibration": self.calibration, "allocation": self.allocation}
        chosen |= {} if self.dense_prompt is None else {"dense_prompt": self.dense_prompt}
        return why_not(constants, chosen) if place.experts else None

    def calibrate(self, place: Place, sample: Sample) -> dict[str, Tensor]:
        """Find what every level needs at one place: thresholds by level, means, a basis.

        Args:
            place: a tensor of one layer.
            sample: that layer's captured activations.

        Returns:
            float32 tensors by name, which `bind` gets.
        """
        raise NotImplementedError(f"{type(self).__name__} is calibrated and has no `calibrate`")

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """The criterion for one place; itself where it treats all places alike.

        Args:
            place: a tensor of one layer.
            state: what `calibrate` found there; empty without a calibration.
        """
        return self

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor | None:
        """What the model goes on with, where dropped entries do not become zeros.

        Args:
            values: [rows, width], what `mask` was asked about.
            written: [rows, width], the vector that is sparsified: `values`, or the product i where
                they are one of its factors.
            mask: bool [rows, width], as `mask` returned it.
            level: in [lowest, highest].

        Returns:
            [rows, width], or None: `written` with zeros where it was dropped.
        """
        return None

    def reach(self, state: dict[str, Tensor], level: float) -> Reach | None:
        """What a level asks of a place, and what it got there on the calibration's tokens.

        Args:
            state: what `calibrate` found at the place, with its allocation.
            level: in [lowest, highest].

        Returns:
            None where a level has no target, or leaves all as it is.
        """
        return None

    def export(self, level: float) -> dict[str, Tensor]:
        """What a kernel of a bound, calibrated criterion needs at a level: float32 tensors by name.

        `threshold`, [] or [width], is what |v| must reach for an entry to be kept.
        """
        return {}

    def threshold(self, level: float, width: int) -> Threshold:
        """The rule at a level.

        Args:
            level: in [lowest, highest].
            width: entries of a row.
        """
        raise NotImplementedError

    def mask(self, values: Tensor, level: float) -> Tensor:
        """Return which entries are kept.

        Args:
            values: [rows, width], one row a token; float32, bfloat16 or float16.
            level: in [lowest, highest].

        Returns:
            bool [rows, width], True where the entry is kept.
        """
        return self.threshold(level, values.shape[-1]).to(values.device).mask(values)


class SequenceCriterion(Criterion):
    """A criterion whose mask for a token follows from tokens before it in the same sequence.

    A bound one may keep what the first pass of a batch tells for the passes of its generation.
    """

    looks_at_weights = False  # Not by expert: of a sequence an expert sees some tokens.

    @property
    def sees_sequences(self) -> bool:
        """See `Criterion.sees_sequences`."""
        return True

    def refuses(self, place: Place) -> str | None:
        """See `Criterion.refuses`."""
        if not place.part.rows_are_tokens(place.tensor):
            return "it looks at whole sequences, of which an expert sees some tokens"
        return super().refuses(place)

    def mask(self, values: Tensor, level: float) -> Tensor:
        """Single rows do not say which sequence they belong to: see `mask_sequences`."""
        raise NotImplementedError(f"{type(self).__name__} masks sequences")

    @abstractmethod
    def mask_sequences(self, values: Tensor, valid: Tensor, phase: Phase, level: float) -> Tensor:
        """Return which entries are kept.

        Args:
            values: [batch, tokens, width].
            valid: bool [batch, tokens], True where a token is no padding.
            phase: `scoring` of given tokens in one pass, the `prompt` of a generation, one pass of the
                `generation` after it, with one new token for each row, or of the `denoising` of whole
                sequences.
            level: in [lowest, highest].

        Returns:
            bool [batch, tokens, width], True where the entry is kept.
        """


class PromptCriterion(SequenceCriterion):
    """A criterion that takes a prompt's mask for what follows it, as `prompt_mask`.

    Studies know it by this: an import of that rule's file would have them run again when it is edited.

    Attributes:
        after: whose mask tokens after the prompt take, the prompt's or each its own.
    """

    after: Literal["prompt", "own"]

    @abstractmethod
    def neurons(self, prompt: Tensor, counted: Tensor, level: float) -> Tensor:
        """See `PromptMask.neurons`."""

    @abstractmethod
    def own(self, values: Tensor, kept: Tensor) -> Tensor:
        """See `PromptMask.own`."""

    @abstractmethod
    def prompt_of(self, valid: Tensor) -> Tensor:
        """See `PromptMask.prompt_of`."""


def keeps_by_threshold(criterion: Criterion) -> bool:
    """Whether entries that are kept by `threshold`, and zeros for all others, are all that there is."""
    return declares_threshold(criterion) and type(criterion).replace is Criterion.replace


def declares_threshold(criterion: Criterion) -> bool:
    """Whether `threshold` says all that the criterion does."""
    kind = type(criterion)
    return kind.mask is Criterion.mask and kind.threshold is not Criterion.threshold


class ColumnWeighted(Criterion):
    """A rule whose scores are weighted by the norms of the columns that the entries meet.

    Stands before the rule itself among a criterion's bases.
    """

    looks_at_weights = True
    _weights: Tensor

    def bind(self, place: Place, state: dict[str, Tensor]) -> Self:
        """See `Criterion.bind`."""
        from sparsity_atlas.criteria.place import relative

        bound = copy.copy(self)
        bound._weights = relative(place.column_norms())
        return bound

    def threshold(self, level: float, width: int) -> Threshold:
        """See `Criterion.threshold`."""
        return replace(super().threshold(level, width), weights=self._weights)
