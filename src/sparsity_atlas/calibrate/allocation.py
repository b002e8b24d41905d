"""How a target sparsity is spread over the places of a site, where not all take the same.

equal_cett    every layer loses the same share of its FFN's output, as CETT does (arXiv 2411.02335)
sensitivity   every place adds the same loss where it is sparsified alone
greedy        block by block, as TEAL does (arXiv 2408.14690): the sparsity of whichever tensor hurts the
              output least, of the FFN or, of all linear inputs, of the block, is raised by a step, again
              and again
evolutionary  over the blocks by an evolution that goes by what the whole model predicts, and within a block
              as greedy does, where that is better than one sparsity for all of its tensors (WiSparse)

An allocation is a table for each place: its own sparsity at each target. It is found on the calibration's
tokens. Of equal_cett and sensitivity the target is the mean over entries, which is the induced sparsity;
of greedy the mean over the parameters that the entries meet, in each block by itself; of evolutionary over
all blocks, over entries where a block has one tensor, else over parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from sparsity_atlas.calibrate.allocation_cost import ERROR_TOKENS
from sparsity_atlas.calibrate.divergence import Divergence
from sparsity_atlas.calibrate.evolution import over_blocks
from sparsity_atlas.criteria.base import Criterion
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.level_table import TARGETS
from sparsity_atlas.criteria.place import places, state_name
from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.sites.block import Block, blocks
from sparsity_atlas.sites.offloading import device_of
from sparsity_atlas.sites.part import by_layer
from sparsity_atlas.sparsify.attach import Drop, dropping
from sparsity_atlas.studies.single_layer import model_of, run, run_alone
from sparsity_atlas.studies.sparse_output import outputs_at, relative, sparse_output
from sparsity_atlas.terms import PlaceKey, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparsity_atlas.criteria.place import State
    from sparsity_atlas.sites.find import Part
    from sparsity_atlas.sites.part import Given

# Sparsities at which a place is tried alone: a layer's error is cheap, a loss takes a forward pass.
ERROR_GRID = np.linspace(0, 1, 21)
LOSS_GRID = np.array([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1])
# A step of the greedy allocation: a share of the tensor whose entries meet the fewest parameters, and of any
# other as many parameters. Of all linear inputs that is 0.05 of `o_input`, as in TEAL's code.
STEP = 0.05
# Sequences of a forward pass that measures a loss.
BATCH = 16
# Allocations that divide what a block has among its tensors.
IN_BLOCKS = ("greedy", "evolutionary")
Inputs = Callable[["Part", str], "Given"]
LayerError = Callable[["Mapping[PlaceKey, float]"], float]
"""Relative error of a layer's output, by the sparsity of each of its tensors."""


def spread(damage: np.ndarray, grid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sparsities at which all places have the same damage, for each mean sparsity of `TARGETS`.

    Args:
        damage: [places, grid], of each place alone; made non-decreasing.
        grid: ascending sparsities from 0 to 1.
        weights: [places], of the mean.

    Returns:
        [places, TARGETS]; non-decreasing, 0 and 1 at the ends.

    Raises:
        NumericalFailure: a damage is not finite.
    """
    if not np.isfinite(damage).all():
        raise NumericalFailure("allocation: dropping makes NaN or infinity of a loss or an output")
    rising = np.maximum.accumulate(damage, axis=1)
    curves = []
    for row in rising:
        # Of equal damages the largest sparsity: what costs nothing is dropped first.
        last = np.append(np.diff(row) > 1e-9 * row[-1], True)
        curves.append((row[last], grid[last]))
    inverse = [
        PchipInterpolator(*curve) if len(curve[0]) > 1 else lambda _: 1.0 for curve in curves
    ]

    def at(level: float) -> np.ndarray:
        return np.array(
            [
                1.0 if level >= x[-1] else float(one(max(level, x[0])))
                for (x, _), one in zip(curves, inverse, strict=True)
            ]
        )

    weights = weights / weights.sum()
    table = np.empty((len(damage), len(TARGETS)))
    for column, target in enumerate(TARGETS):
        low, high = 0.0, float(rising.max()) or 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if weights @ at(middle) < target else (low, middle)
        # What is free at every place may exceed the target by itself.
        found = at(high)
        table[:, column] = found * min(1.0, target / (weights @ found)) if target else 0.0
    table[:, -1] = 1.0
    return np.maximum.accumulate(table, axis=1)


def layer_errors(error: LayerError, names: Sequence[PlaceKey], grid: np.ndarray) -> np.ndarray:
    """Error of one layer with its tensors sparsified one at a time: [tensors, grid].

    Args:
        error: of the layer's output, by each tensor's sparsity.
        names: of the tensors.
        grid: sparsities.
    """
    return np.array(
        [[error({**dict.fromkeys(names, 0.0), name: s}) for s in grid] for name in names]
    )


def error_of(
    parts: Sequence[Part], inputs: Inputs, site: str, rules: Mapping[PlaceKey, Criterion]
) -> LayerError:
    """Mean over tokens (and outputs of a layer) of the relative error, by each tensor's level."""
    given = {output: inputs(*output) for output in outputs_at(parts, site)}
    dense = {output: output.part.run(own, output.site) for output, own in given.items()}

    def error(levels: Mapping[PlaceKey, float]) -> float:
        fixed = {name: _Fixed(rule, float(levels[name])) for name, rule in rules.items()}
        means = []
        for output, own in given.items():
            made, _, _ = sparse_output(output, own, fixed, 0.0)
            total, count = relative(dense[output], made)
            means.append(total / count if count else 0.0)
        return sum(means) / len(means)

    return error


class _Fixed(Criterion):
    """A criterion that is asked for any level and answers for one."""

    def __init__(self, rule: Criterion, level: float) -> None:
        self._rule, self._level = rule, level

    def mask(self, values: Tensor, level: float) -> Tensor:
        """See `Criterion.mask`."""
        return self._rule.mask(values, self._level)

    def replace(self, values: Tensor, written: Tensor, mask: Tensor, level: float) -> Tensor | None:
        """See `Criterion.replace`."""
        return self._rule.replace(values, written, mask, self._level)


def single_losses(
    parts: Sequence[Part],
    site: str,
    bound: Mapping[PlaceKey, Criterion],
    ids: Tensor,
    grid: np.ndarray,
    batch: int = BATCH,
) -> np.ndarray:
    """Loss that each place adds where it alone is sparsified: the single-layer sensitivity.

    Args:
        parts: all of one model.
        site: where.
        bound: the criterion at every place.
        ids: int64 [sequences, positions].
        grid: sparsities.
        batch: sequences a forward pass.

    Returns:
        [places, grid], nats per token.

    Raises:
        NumericalFailure: NaN or an infinity came up.
    """
    dense = run(model_of(parts), ids, batch).nats.sum()
    found = np.zeros((len(bound), len(grid)))
    for row, (place, rule) in enumerate(bound.items()):
        for column in np.flatnonzero(grid):  # at 0 nothing changes
            alone = run_alone(parts, site, place, rule, float(grid[column]), ids, batch)
            found[row, column] = alone.nats.sum() - dense
    return found / ids[:, 1:].numel()


def _without(drop: Drop, values: Tensor) -> Tensor:
    return drop(values, values).out


def block_error(block: Block, rules: Mapping[PlaceKey, Criterion]) -> LayerError:
    """Mean over tokens of the relative error of a whole block's output, by each tensor's level."""
    dense = block.output({})

    def error(levels: Mapping[PlaceKey, float]) -> float:
        drops = {name: dropping(_Fixed(rule, levels[name]), 0.0) for name, rule in rules.items()}
        output = block.output({name: partial(_without, drop) for name, drop in drops.items()})
        total, count = relative(dense.flatten(0, 1), output.flatten(0, 1))
        return total / count if count else 0.0

    return error


def greedy(error: LayerError, names: Sequence[PlaceKey], parameters: np.ndarray) -> np.ndarray:
    """TEAL's block-wise greedy allocation for one layer: [tensors, TARGETS].

    Steps drop the same number of parameters, whichever tensor they are taken in. The maps that read one
    tensor have one sparsity; TEAL's have one each, as at a site by projection.

    Args:
        error: of the layer's output, by each tensor's sparsity.
        names: of the tensors.
        parameters: that each tensor's entries meet.
    """
    share = parameters / parameters.sum()
    steps = STEP * parameters.min() / parameters
    now = np.zeros(len(names))
    means, path = [0.0], [now]
    while (now < 1).any():
        tries = []
        for k in np.flatnonzero(now < 1):
            step = now.copy()
            step[k] = min(now[k] + steps[k], 1.0)
            levels = dict(zip(names, step.tolist(), strict=True))
            tries.append((error(levels), step))
        now = min(tries, key=lambda one: one[0])[1]
        means.append(float(share @ now))
        path.append(now)
    return np.array([np.interp(TARGETS, means, column) for column in np.array(path).T])


def allocate(
    criterion: Criterion,
    parts: Sequence[Part],
    site: str,
    states: Mapping[str, State],
    inputs: Inputs,
    ids: np.ndarray,
) -> dict[str, State]:
    """The table of each place, as its state has it: `share`, and `damage` at the sparsities of `grid`.

    Args:
        criterion: names the allocation.
        parts: all of one model.
        site: where.
        states: what the criterion found at each place.
        inputs: what `Part.sources` names of a part and a site of its own, of the same tokens.
        ids: int64 [sequences, positions] of the calibration.
    """
    bound = bind_all(criterion, parts, site, states)
    there = list(places(parts, site))
    layers = [own for own in by_layer(parts).values() if any(places(own, site))]
    rules = [
        {key: rule for key, rule in bound.items() if key.layer == own[0].layer} for own in layers
    ]
    kind = criterion.allocation
    few = torch.from_numpy(ids[: max(1, ERROR_TOKENS // ids.shape[1])])
    with torch.no_grad():
        if kind == "sensitivity":
            grid = LOSS_GRID
            damage = single_losses(parts, site, bound, torch.from_numpy(ids), grid)
        else:
            grid = ERROR_GRID
            if kind in IN_BLOCKS and plain(site) == "all_linear_inputs":
                whole = blocks(parts, few.to(device_of(parts[0].model)))
                errors = [block_error(*one) for one in zip(whole, rules, strict=True)]
            else:
                errors = [
                    error_of(own, inputs, site, known)
                    for own, known in zip(layers, rules, strict=True)
                ]
            damage = np.concatenate(
                [
                    layer_errors(error, list(known), grid)
                    for error, known in zip(errors, rules, strict=True)
                ]
            )
        if kind in IN_BLOCKS:
            met = {
                place.key: place.part.size(place.tensor) * place.part.outputs(place.tensor)
                for place in there
            }
            parameters = [np.array([met[key] for key in known], np.float64) for known in rules]
            # Among one tensor there is nothing to divide.
            fine = [
                greedy(error, list(known), own) if len(own) > 1 else TARGETS[None]
                for error, known, own in zip(errors, rules, parameters, strict=True)
            ]
        sizes = np.array([place.part.size(place.tensor) for place in there], dtype=np.float64)
        if kind == "greedy":
            share = np.concatenate(fine)
        elif kind == "evolutionary":
            divergence = Divergence(parts, site, few, BATCH)

            def cost(sparsities: np.ndarray) -> float:
                pairs = zip(bound.items(), sparsities.tolist(), strict=True)
                return divergence({key: _Fixed(rule, own) for (key, rule), own in pairs}, 0.0)

            alone = all(len(own) == 1 for own in fine)
            weights = sizes if alone else np.array([own.sum() for own in parameters])
            share = over_blocks(cost, fine, weights, TARGETS)
        else:
            share = spread(damage, grid, sizes)
    return {
        state_name(place.key): {
            "share": torch.from_numpy(share[row]),
            "damage": torch.from_numpy(damage[row]),
            "grid": torch.from_numpy(grid),
        }
        for row, place in enumerate(there)
    }
