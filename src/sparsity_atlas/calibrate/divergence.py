"""How far a sparsified model's next tokens are from the dense model's: Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from sparsity_atlas.errors import NumericalFailure
from sparsity_atlas.models.logits import head
from sparsity_atlas.sparsify.attach import applied
from sparsity_atlas.studies.single_layer import model_of

if TYPE_CHECKING:
    from sparsity_atlas.criteria.base import Criterion
    from sparsity_atlas.sites.find import Part
    from sparsity_atlas.terms import PlaceKey


class Divergence:
    """Mean over tokens of Σ p ln (p / q), p of the dense model and q of the sparsified one, in nats.

    Unlike the loss it needs no next token, whose chance would count as the model's, and is 0 only where
    nothing changes. The dense model's log-probabilities are kept on the host: float32 [tokens, vocabulary].
    """

    def __init__(self, parts: Sequence[Part], site: str, ids: Tensor, batch: int) -> None:
        """Run the dense model.

        Args:
            parts: all of one model.
            site: where it is to be sparsified.
            ids: int64 [sequences, positions].
            batch: sequences a forward pass.
        """
        self._model, self._parts, self._site = model_of(parts), parts, site
        self._batches = ids.to(self._model.device).split(batch)
        head.able(self._model)  # found out before anything is attached
        with torch.no_grad():
            self._dense = [
                [one.cpu() for one in self._log_probabilities(rows)] for rows in self._batches
            ]

    def _log_probabilities(self, rows: Tensor) -> Iterator[Tensor]:
        def call() -> Tensor:
            found: Tensor = self._model(input_ids=rows, use_cache=False).logits
            return found

        every = torch.arange(rows.numel(), device=rows.device)
        pieces = head.logits(self._model, call, every, select=head.able(self._model))
        return (piece.float().log_softmax(-1) for piece in pieces)

    def __call__(self, rules: Mapping[PlaceKey, Criterion], level: float) -> float:
        """The divergence with a criterion at each place.

        Args:
            rules: bound, by place.
            level: of all of them.

        Raises:
            NumericalFailure: NaN or an infinity came up.
        """
        total = 0.0
        with (
            torch.no_grad(),
            applied(self._model, self._parts, self._site, rules, level) as counter,
        ):
            for rows, dense in zip(self._batches, self._dense, strict=True):
                counter.expect(torch.ones_like(rows, dtype=torch.bool))
                for kept, own in zip(dense, self._log_probabilities(rows), strict=True):
                    each = kl_div(own, kept.to(own.device), reduction="none", log_target=True)
                    total += float(each.sum(-1).cpu().double().sum())
                counter.take()
        if not total < float("inf"):
            raise NumericalFailure(
                "allocation: NaN or infinity in what the sparsified model predicts"
            )
        tokens: int = sum(rows.numel() for rows in self._batches)
        return total / tokens
