"""Attach a criterion at a site and count zeros, without waiting for the device inside a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from sparsity_atlas import kernels
from sparsity_atlas.criteria.base import Criterion, SequenceCriterion, keeps_by_threshold
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.kernels import Masked
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.find import intercept, observe, sites_of
from sparsity_atlas.sparsify.counted_vectors import slots_of
from sparsity_atlas.sparsify.counter import Counter
from sparsity_atlas.sparsify.each_expert import Drop, dropping_of_each
from sparsity_atlas.sparsify.sparing import sparing
from sparsity_atlas.sparsify.step_masks import left
from sparsity_atlas.sparsify.together import Together

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from sparsity_atlas.criteria.dense_prompt import DensePrompt
    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.terms import Phase, PlaceKey

__all__ = ["Counter", "Drop", "NumericalFailure", "applied", "counted", "dropping", "sparsified"]

Sequences = Callable[["Tensor"], "tuple[Tensor, Phase]"]


def scored(values: Tensor) -> tuple[Tensor, Phase]:
    """Whole sequences [batch, tokens, width] that are scored in one pass; see `Counter.sequences`."""
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device), "scoring"


def dropping(criterion: Criterion, level: float, sequences: Sequences = scored) -> Drop:
    """What a bound criterion does at a level, by the fastest path there is; prepared once a width.

    Args:
        criterion: as it is bound to the tensor.
        level: its number.
        sequences: which tokens of [batch, tokens, width] are valid, and their phase; asked where the
            criterion looks at more than one token.

    Raises:
        AtlasError: (when called) a criterion of the user's that returns no mask of the right type.
    """
    if isinstance(criterion, ExpertRules):
        return dropping_of_each(criterion, level, lambda rule: dropping(rule, level, sequences))
    if not keeps_by_threshold(criterion):
        return lambda values, onto, _=None: _by_mask(criterion, values, onto, level, sequences)

    @cache
    def rule(width: int, device: torch.device) -> Threshold:
        return criterion.threshold(level, width).to(device)

    return lambda values, onto, _=None: kernels.masked(
        rule(values.shape[-1], values.device), values, onto
    )


def _by_mask(
    criterion: Criterion, values: Tensor, onto: Tensor, level: float, sequences: Sequences
) -> Masked:
    shape, device = values.shape, values.device
    # Apple's MPS has no float64, which a definition may need.
    seen, written = (one.cpu() if device.type == "mps" else one for one in (values, onto))
    rows, written = (one.reshape(-1, shape[-1]) for one in (seen, written))
    if isinstance(criterion, SequenceCriterion):
        valid, phase = sequences(seen)
        mask = criterion.mask_sequences(seen, valid.to(seen.device), phase, level).view(rows.shape)
    else:
        mask = criterion.mask(rows, level)
    if not (torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == rows.shape):
        found = f"{mask.dtype} {list(mask.shape)}" if torch.is_tensor(mask) else type(mask)
        raise AtlasError(
            f"{type(criterion).__name__}.mask: expected torch.bool {list(rows.shape)}, "
            f"found {found}"
        )
    masked = kernels.by_mask(mask.to(device).view(shape), values, onto)
    replaced = criterion.replace(rows, written, mask, level)
    return masked if replaced is None else masked._replace(out=replaced.to(device).view(shape))


@contextlib.contextmanager
def counted(model: nn.Module, parts: Sequence[Part]) -> Iterator[Counter]:
    """Count exact zeros at every site of an untouched model."""
    counter = Counter(slots_of(parts, None), masked=False)
    # A threshold that drops nothing counts in one pass.
    everything = Threshold("fixed", constants=torch.zeros(1))

    @cache
    def rule(device: torch.device) -> Threshold:
        return everything.to(device)

    def at_once(vectors: Vectors) -> None:
        values = vectors.values
        found = kernels.masked(rule(values.device), values, values)
        counter.add(vectors, found.zeros, found.finite)

    together = Together(model, counter, at_once)
    handle = model.register_forward_pre_hook(together.begin_pass)
    try:
        with _passes(model, counter), observe(parts, sites_of(parts), together.add):
            yield counter
    finally:
        handle.remove()


@contextlib.contextmanager
def sparsified(
    model: nn.Module,
    parts: Sequence[Part],
    site: str,
    criterion: Criterion,
    level: float,
    calibration: Mapping[str, State] | None = None,
    *,
    by_step: bool = True,
) -> Iterator[Counter]:
    """Drop what `criterion` drops at `site` in every layer, and count zeros there.

    A dropped entry counts as a zero also where the criterion puts something in its place.
    `by_step=False`: masks of a generation by denoising are not followed from step to step.
    """
    bound = bind_all(criterion, parts, site, calibration)
    dense = criterion.dense_prompt
    with applied(model, parts, site, bound, level, by_step=by_step, dense=dense) as counter:
        yield counter


@contextlib.contextmanager
def applied(
    model: nn.Module,
    parts: Sequence[Part],
    site: str,
    bound: Mapping[PlaceKey, Criterion],
    level: float,
    *,
    by_step: bool = True,
    dense: DensePrompt | None = None,
) -> Iterator[Counter]:
    """Drop what bound criteria drop at their places of a site, and count zeros there.

    Args:
        model: the model.
        parts: all of its own.
        site: where.
        bound: a criterion by place; a place of the site that is not among them stays dense.
        level: of all of them.
        by_step: see `sparsified`.
        dense: what stays dense of each prompt.
    """
    if any(isinstance(rule, ExpertRules) for rule in bound.values()):
        parts = [part.apart() for part in parts]
    slots = [slot for slot in slots_of(parts, site) if slot.key in bound]
    counter = Counter(slots, masked=by_step)
    counter.by_token = not any(isinstance(rule, SequenceCriterion) for rule in bound.values())
    drops = {place: dropping(rule, level, counter.sequences) for place, rule in bound.items()}
    if dense is not None:
        drops = {place: sparing(drop, dense, counter.sequences) for place, drop in drops.items()}

    def rewrite(vectors: Vectors, onto: Tensor) -> Tensor | None:
        drop = drops.get(vectors.key)
        if drop is None:
            return None
        found = drop(vectors.values, onto, vectors.spread)
        counter.add(vectors, found.zeros, found.finite)
        if counter.by_step.counts:
            counter.by_step.add(vectors, left(drop, found, vectors, onto))
        return found.out

    with _passes(model, counter), intercept(parts, site, rewrite):
        yield counter


@contextlib.contextmanager
def _passes(model: nn.Module, counter: Counter) -> Iterator[None]:
    handle = model.register_forward_pre_hook(counter.begin_pass)
    try:
        yield
    finally:
        handle.remove()
