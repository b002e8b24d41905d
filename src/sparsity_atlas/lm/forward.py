"""One forward pass over a batch of `forest`: log-probabilities, and zeros along each request.

Nothing here waits for the device: what is read of it is a function, which waits when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from sparsity_atlas.models.logits import head
from sparsity_atlas.models.logits.likelihoods import likelihoods
from sparsity_atlas.sparsify.attach import NumericalFailure
from sparsity_atlas.sparsify.transfer import fetched, sent

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from sparsity_atlas.lm.forest import Batch

Call = Callable[..., "Tensor"]

# Types of layers, as transformers names them, of which it is known how far back they see.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class Masks(StrEnum):
    """How a model is told who sees whom in a row that branches."""

    ONE = "one"  # one mask for all layers
    WINDOWED = "windowed"  # one mask, with the model's window of attention
    BY_LAYER = "by_layer"  # a mask for each type of layer, as transformers names them


@dataclass(frozen=True)
class Abilities:
    """What a model was seen to do right; see `proof`.

    Attributes:
        branches: rows may branch: it takes a mask of who sees whom, and positions.
        selects: its head may be shown the scored tokens only, a piece at a time.
        follows: what it says of a sequence follows the longest one of a batch or so far, so that batches
            are lm-eval's own; see `longest`.
        masks: how rows that branch are masked.
    """

    branches: bool = False
    selects: bool = False
    follows: bool = False
    masks: Masks = Masks.ONE


def inputs(
    model: PreTrainedModel, batch: Batch, masks: Masks = Masks.ONE
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids [rows, longest] and further arguments of the forward pass over a batch.

    A batch without branches is run as any: no mask (what stands behind a token does not change it),
    and positions as the model counts them.
    """
    device = model.device
    options = head.without_cache(model)
    if batch.branched:
        options["position_ids"] = sent(batch.depth, device)
        options["attention_mask"] = _masks(model, batch, masks)
    return sent(batch.tokens, device), options


def _masks(model: PreTrainedModel, batch: Batch, masks: Masks) -> Tensor | dict[str, Tensor]:
    config = model.config.get_text_config()
    ends, depth = (sent(one, model.device) for one in (batch.ends, batch.depth))
    if masks is Masks.BY_LAYER:
        return {
            kind: _mask(ends, depth, *reach, model.dtype)
            for kind, reach in reach_by_layer(config).items()
        }
    window = config.sliding_window if masks is Masks.WINDOWED else None
    return _mask(ends, depth, window, None, model.dtype)


def reach_by_layer(config: Any) -> dict[str, tuple[int | None, int | None]]:
    """How far back a model's layers see, by their type as transformers names it: window, chunk; see `_mask`.

    Raises:
        KeyError: a type that is none of `LAYER_TYPES`.
    """
    window, chunk = (
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
    )
    reaches = ((None, None), (window, None), (None, chunk))
    known = dict(zip(LAYER_TYPES, reaches, strict=True))
    return {kind: known[kind] for kind in set(config.layer_types)}


def _mask(
    ends: Tensor, depth: Tensor, window: int | None, chunk: int | None, dtype: torch.dtype
) -> Tensor:
    """What is added to attention scores, [rows, 1, queries, keys]: 0 for what a token sees.

    Args:
        ends: as `Batch.ends`.
        depth: as `Batch.depth`.
        window: how many of its ancestors, itself among them, a token sees; None: all.
        chunk: tokens of the pieces of a request beyond whose beginning none sees; None: there are none.
        dtype: of the scores.
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place[:, None] >= place) & (place[:, None] < ends[:, None])
    if window is not None:
        seen &= depth[:, :, None] - depth[:, None] < window
    if chunk is not None:
        seen &= depth[:, :, None] // chunk == depth[:, None] // chunk
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, hidden)[
        :, None
    ]


def before_head(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Hidden states [rows, longest, hidden] that a model's head would get, which is not run.

    Of a model of which no module is the head, its logits.
    """
    if model.get_output_embeddings() is None:
        logits: Tensor = model.forward(ids, **options).logits
        return logits
    seen: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])
        raise _Enough

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        # Past the hooks on the model itself, which count an evaluation's passes.
        model.forward(ids, **options)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


class _Enough(Exception):
    """Ends a forward pass before the head."""


def logits(
    model: PreTrainedModel,
    call: Call,
    batch: Batch,
    *,
    select: bool,
    masks: Masks = Masks.ONE,
) -> Iterator[Tensor]:
    """Logits of the tokens whose successor is predicted, in pieces [rows, vocabulary].

    The pass is made at once. Whoever keeps no piece needs the memory of one.

    Args:
        model: the model.
        call: runs it and returns its logits.
        batch: what to run.
        select: keep all other tokens from the model's head; if not, it makes the batch's at once.
        masks: how rows that branch are masked.
    """
    where = sent(batch.scored, model.device)
    ids, options = inputs(model, batch, masks)
    return head.logits(model, lambda: call(ids, **options), where, select=select)


def scores(pieces: Iterable[Tensor], batch: Batch) -> Callable[[], tuple[list[float], list[bool]]]:
    """Sum of each request's log-probabilities, and whether each of its tokens is the likeliest.

    Args:
        pieces: logits [rows, vocabulary] of the tokens `batch.scored`, in order.
        batch: where they come from.

    Raises:
        NumericalFailure: (when they are read) a sum is NaN or infinite.
    """
    order = np.argsort(batch.row, kind="stable")
    wait = fetched(likelihoods(pieces, batch.row[order], batch.targets[order]))

    def read() -> tuple[list[float], list[bool]]:
        value = np.empty(len(order))
        hit = np.empty(len(order), dtype=bool)
        value[order], hit[order] = wait()
        sums = np.add.reduceat(value, batch.firsts)
        if not np.isfinite(sums).all():
            raise NumericalFailure("NaN or infinity in the logits")
        return sums.tolist(), np.logical_and.reduceat(hit, batch.firsts).tolist()

    return read


def zeros_by_document(zeros: Tensor, batch: Batch) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Zeros of each document's requests, int64 [documents, slots].

    Args:
        zeros: of each token, [slots, rows, longest].
        batch: what was run.

    Returns:
        With each token counted as often as it stands in a request that counts, and each of them once.
    """
    if zeros.device.type == "mps":  # which adds up no 64-bit integers
        zeros = zeros.cpu()
    each = zeros.flatten(1)
    longest = batch.tokens.shape[1]
    starts = np.arange(len(batch.tokens))[:, None] * longest
    ends = sent((batch.ends + starts).ravel(), each.device)
    # A token counts for all nodes from its own to its last descendant: up at the one, down behind the
    # other, and the running sum is the sum over a node's ancestors.
    steps = F.pad(each, (0, 1)).index_add_(1, ends, -each)
    sums = F.pad(steps.cumsum(1), (1, 0))  # a first column of zeros, for `known` -1
    last, known = (
        sums[:, sent(index + 1, each.device)].T for index in (batch.last, batch.known)
    )  # [requests, slots]
    owners = sent(batch.owners, each.device)
    empty = last.new_zeros(len(batch.documents), last.shape[1])
    counted = sent(batch.counted, each.device)
    every = empty.index_add(0, owners, last * counted[:, None])
    once = empty.index_add(0, owners, last - known)
    wait = fetched((every, once))

    def read() -> tuple[np.ndarray, np.ndarray]:
        every, once = wait()
        return every, once

    return read
