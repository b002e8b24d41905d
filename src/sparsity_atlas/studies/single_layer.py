"""One tensor of one layer sparsified alone, all else dense: what that adds to the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.sparsify.attach import Counter, applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.sites.find import FFN


class Pass(NamedTuple):
    """What a pass over some sequences showed.

    nats: float64 [sequences], negative log-likelihood of all tokens but each sequence's first.
    zeros: int64 [sequences], at the place that was sparsified.
    """

    nats: np.ndarray
    zeros: np.ndarray


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
        for rows in ids.to(next(model.parameters()).device).split(batch):
            if counter is not None:
                counter.expect(torch.ones_like(rows, dtype=torch.bool))
            logits = model(input_ids=rows, use_cache=False).logits
            # A sequence at a time: at a vocabulary of 200,000 a batch in float32 fills a GPU.
            for row, own in zip(rows, logits, strict=True):
                each = F.cross_entropy(own[:-1].float(), row[1:], reduction="none")
                nats.append(each.cpu().double().sum())
            if counter is not None:
                zeros.append(counter.take()[0].sum((0, 2)).cpu())
    found = Pass(
        torch.stack(nats).numpy(),
        torch.cat(zeros).numpy() if zeros else np.zeros(len(nats), dtype=np.int64),
    )
    if not np.isfinite(found.nats).all():
        raise NumericalFailure("NaN or infinity in the loss")
    return found


def run_alone(
    ffns: list[FFN],
    site: str,
    place: tuple[int, str],
    rule: Criterion,
    level: float,
    ids: Tensor,
    batch: int,
) -> Pass:
    """Run sequences with one place sparsified.

    Args:
        ffns: all FFNs of one model.
        site: that has the place.
        place: layer and tensor.
        rule: the criterion as it is bound there.
        level: of the criterion.
        ids: int64 [sequences, positions].
        batch: sequences a forward pass.

    Raises:
        NumericalFailure: NaN or an infinity at the place, or in the loss.
    """
    model = ffns[0].model
    with applied(model, ffns, site, {place: rule}, level) as counter:
        return run(model, ids, batch, counter)
