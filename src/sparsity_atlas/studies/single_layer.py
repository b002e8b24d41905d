"""One tensor of one layer sparsified alone, all else dense: what that adds to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.models.logits import head
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.sparsify.attach import Counter, applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.sites.find import Part
    from sparsity_atlas.terms import PlaceKey


class Pass(NamedTuple):
    """What a pass over some sequences showed.

    nats: float64 [sequences], negative log-likelihood of all tokens but each sequence's first.
    zeros: int64 [sequences], at the place that was sparsified.
    """

    nats: np.ndarray
    zeros: np.ndarray


def model_of(parts: Sequence[Part]) -> PreTrainedModel:
    """The model whose parts these are: sites are found in any module, and studied in what was loaded."""
    return cast("PreTrainedModel", parts[0].model)


def run(model: PreTrainedModel, ids: Tensor, batch: int, counter: Counter | None = None) -> Pass:
    """Run sequences through a model as it is.

    Args:
        model: the model, with whatever is attached to it.
        ids: int64 [sequences, positions].
        batch: sequences a forward pass.
        counter: of the place that is sparsified, if one is.

    Raises:
        NumericalFailure: NaN or an infinity at the place that is sparsified, or in the loss.
    """
    nats, zeros = [], []
    with torch.no_grad():
        for rows in ids.to(model.device).split(batch):
            if counter is not None:
                counter.expect(torch.ones_like(rows, dtype=torch.bool))
            nats += [one.cpu().double().sum() for one in token_nats(model, rows)]
            if counter is not None:
                zeros.append(counter.take()[0].sum((0, 2)).cpu())
    found = Pass(
        torch.stack(nats).numpy(),
        torch.cat(zeros).numpy() if zeros else np.zeros(len(nats), dtype=np.int64),
    )
    if not np.isfinite(found.nats).all():
        raise NumericalFailure("NaN or infinity in the loss")
    return found


def token_nats(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Negative log-likelihood of each token [sequences, positions - 1] but each sequence's first."""

    def call() -> Tensor:
        found: Tensor = model(input_ids=rows, use_cache=False).logits
        return found

    index = torch.arange(rows.numel(), device=rows.device).view_as(rows)[:, :-1].flatten()
    pieces = head.logits(model, call, index, select=head.able(model))
    targets = rows[:, 1:].flatten().cpu().numpy()
    likely, _ = likelihoods(pieces, np.arange(len(targets)), targets)
    return -likely.view(len(rows), -1)


def run_alone(
    parts: Sequence[Part],
    site: str,
    place: PlaceKey,
    rule: Criterion,
    level: float,
    ids: Tensor,
    batch: int,
) -> Pass:
    """Run sequences with one place sparsified.

    Args:
        parts: all of one model.
        site: that has the place.
        place: which it is.
        rule: the criterion as it is bound there.
        level: of the criterion.
        ids: int64 [sequences, positions].
        batch: sequences a forward pass.

    Raises:
        NumericalFailure: NaN or an infinity at the place, or in the loss.
    """
    model = model_of(parts)
    head.able(model)  # found out before anything is attached
    with applied(model, parts, site, {place: rule}, level) as counter:
        return run(model, ids, batch, counter)
