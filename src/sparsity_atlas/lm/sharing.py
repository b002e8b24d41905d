"""What a model does right when requests share a row, seen on its own numbers.

Hidden states are compared where they reach the head, so that no vocabulary's width of logits is made.
What is proved holds for requests as long as the sample's and for rows as long as its row, which is as
long as a tree of such requests may grow. The answers are kept in the user's cache, under all that they
depend on.

Of a mixture of experts each request by itself is routed as it was in the shared row: a score within
rounding of the next one may choose another expert, which would be seen as a mistake. Where the tokens of
another branch are changed, these go to the experts that they went to before, since the last bits of a
product follow how many rows its expert has. What the routers make of all other tokens is their own, so
that one that depends on a neighbour is seen.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsity_atlas.lm.answers import Answers, Proof
from sparsity_atlas.lm.forest import Batch, Request, pack
from sparsity_atlas.lm.forward import LAYER_TYPES, Abilities, Masks, before_head, inputs
from sparsity_atlas.lm.trees.planting import GROWTH, SMALL_TREE
from sparsity_atlas.models.layer_settings import in_all_layers
from sparsity_atlas.models.logits import head
from sparsity_atlas.models.logits.head import EXACT, REFUSALS, ROUNDED
from sparsity_atlas.sites.experts.experts_modules import experts_modules
from sparsity_atlas.sites.experts.implementation import installed
from sparsity_atlas.sites.experts.routing import Choices, recorded, repeated
from sparsity_atlas.sites.probe.hypotheses import relative_error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CALLS = inspect.getfile(before_head)
_PACKAGE = str(Path(_CALLS).parents[1])
# So much farther off must a row without its mask be.
DISTINCT = 8
# Predictions compared at the end of each request.
PREDICTIONS = 16
# Tokens of the shortest sample. A GPU waits for the host in passes over fewer than these, and so one sample
# serves the tasks of short requests, which on the CPU cost what they are long.
SHORTEST_SAMPLE = {"cuda": 512}
SMALLEST = 64


def abilities(
    model: PreTrainedModel,
    requests: list[Request],
    *,
    branching: bool = True,
    most: int = 0,
    answers: Answers | None = None,
    tries: bool = True,
) -> tuple[Abilities, dict[str, str]]:
    """Try what saves time on samples of some requests' tokens, without any hook of ours.

    A row that branches must give the hidden states of its requests by themselves, as far as rounding
    lets that be seen, and not one bit may depend on the tokens of another branch. The sample is as long
    as the longest request, because a window of attention shows in no shorter one.

    Args:
        model: the model.
        requests: that are to be run.
        branching: whether rows of theirs would branch; if not, that is not tried.
        most: length up to which the sample may be rounded up, so that its answer serves other tasks.
        answers: what is known already; what is found is added.
        tries: whether what is not known may be tried.

    Returns:
        What the model does right, and of the rest what is wrong with it.

    Raises:
        Untried: something is not known, and nothing may be tried.
    """
    answers = Answers() if answers is None else answers
    tokens = max((request.tokens for request in requests), key=len)
    faults = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if experts_modules(model):
            # What runs in an evaluation.
            stack.enter_context(installed(model))
        if answers.selects is None:
            if not tries:
                raise Untried
            answers.add_selects(head.fault(model))
        if answers.selects:
            faults["selects"] = answers.selects
        masks: Masks | None = None
        if branching:
            proof = _proof(model, tokens, most, answers, tries=tries)
            masks = proof.masks
            if masks is None:
                faults["branches"] = proof.fault
    found = Abilities(
        branches=masks is not None, selects=not answers.selects, masks=masks or Masks.ONE
    )
    return found, faults


class Untried(Exception):
    """What a model does right is not known, and must not be tried now."""


def _proof(
    model: PreTrainedModel, tokens: list[int], most: int, answers: Answers, *, tries: bool
) -> Proof:
    """What is known, or is now found, of requests as long as `tokens`."""
    length = len(tokens) - 1
    rounded = round_up(length, SHORTEST_SAMPLE.get(model.device.type, SMALLEST), window_of(model))
    for tried in dict.fromkeys((max(min(rounded, most), length), length)):
        known = answers.about(length)
        if known is not None:
            return known
        if not tries:
            raise Untried
        answers.add(_prove(model, _stretched(tokens, tried + 1)))
    found = answers.about(length)
    assert found is not None
    return found


def round_up(length: int, least: int, window: int | None) -> int:
    """The next of 64, 96, 128, 192, 256, ..., not below `least`, nor beyond a window that holds the request.

    Beyond its window a model may want other masks.
    """
    size = least
    while size < length:
        size *= 2
    size = 3 * size // 4 if least < size and length <= 3 * size // 4 else size
    return min(size, window) if window and length <= window else size


def window_of(model: PreTrainedModel) -> int | None:
    """The length beyond which some of a model's layers do not see: their window, or their chunks."""
    config = model.config.get_text_config()
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    name = "attention_chunk_size" if chunked else "sliding_window"
    window: int | None = in_all_layers(config, name)
    return window


def _stretched(tokens: list[int], length: int) -> list[int]:
    return (tokens * (length // len(tokens) + 1))[:length]


def _prove(model: PreTrainedModel, tokens: list[int]) -> Proof:
    """Try the ways to tell a model who sees whom, the likeliest first."""
    sample = _sample(tokens)
    length = len(tokens) - 1
    (shared,) = pack(sample, len(sample), share=True)
    # Those at both ends of the row: what follows a place in it shows there.
    ends = sorted({shared.requests[int(shared.last.argmin())], _last(shared)})
    fault = "its requests do not branch"
    if shared.branched:
        alone = pack([sample[number] for number in ends], len(ends), share=False)
        plain = [replace(one, requests=[ends[number] for number in one.requests]) for one in alone]
        for masks in ways(model, length):
            tried = _fault(partial(_sharing, model, shared, plain, masks))
            if tried is None:
                return Proof(length, masks)
            fault = tried
    return Proof(length, None, fault)


def ways(model: PreTrainedModel, length: int) -> Iterator[Masks]:
    """Masks that a model may want for requests of this length."""
    window = window_of(model)
    windowed = []
    if window:
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
        if len(layers) < 2 and "chunked_attention" not in layers:
            windowed = [Masks.WINDOWED]
        elif layers <= set(LAYER_TYPES):  # a state beside the windows takes no mask at all
            windowed = [Masks.BY_LAYER]
    # A window that no request reaches needs no mask.
    yield from [*windowed, Masks.ONE] if window and length > window else [Masks.ONE]


def _sample(tokens: list[int]) -> list[Request]:
    """A request, and others that leave it later with tokens of its own, as many as a row may hold."""
    length = len(tokens) - 1
    draw = random.Random(0)
    row, requests = length, [tokens]
    while True:
        kept = (length + 1) // 2 if len(requests) == 1 else -(-3 * length // 4)
        row += length - kept
        if length == kept or row > max(GROWTH * length, SMALL_TREE):
            break
        requests.append(tokens[:kept] + draw.choices(tokens, k=len(tokens) - kept))
    return [Request(one, min(length, PREDICTIONS), 0) for one in requests]


def _last(batch: Batch) -> int:
    return batch.requests[int(batch.last.argmax())]


def _hidden(model: PreTrainedModel, batch: Batch, masks: Masks = Masks.ONE) -> dict[int, Tensor]:
    """What the head gets for each request's predictions, by request."""
    ids, options = inputs(model, batch, masks)
    try:
        every = before_head(model, ids, **options)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as refusal:
        if _is_ours(refusal):
            raise
        first = (str(refusal).splitlines() or [""])[0]
        raise _Refusal(f"{type(refusal).__name__}: {first}") from refusal
    if every.shape[:-1] != ids.shape:
        found, wanted = list(every.shape), list(ids.shape)
        raise _Refusal(f"hidden states of shape {found} of tokens of shape {wanted}")
    flat = every.flatten(0, 1)
    parts = np.split(batch.scored[batch.row], batch.firsts[1:])
    return {
        request: flat[torch.from_numpy(places).to(flat.device)]
        for request, places in zip(batch.requests, parts, strict=True)
    }


def _sharing(model: PreTrainedModel, batch: Batch, plain: list[Batch], masks: Masks) -> str | None:
    """What is wrong with a row that branches, beside some of its requests by themselves."""
    with recorded(model) as routing:
        before = _hidden(model, batch, masks)
    expected = {
        number: states
        for alone in plain
        for number, states in _by_themselves(model, alone, batch, routing).items()
    }
    found = [before[number] for number in expected]
    return (
        _difference(model, list(expected.values()), found)
        or _indistinct(model, batch, expected, found, masks)
        or _interference(model, batch, before, masks, routing)
    )


def _by_themselves(
    model: PreTrainedModel, alone: Batch, shared: Batch, routing: Choices
) -> dict[int, Tensor]:
    """`_hidden` of a batch of requests, routed as they were in the row that they share."""
    place = np.arange(shared.tokens.shape[1])
    # Of each token of the batch, where the row has it.
    rows = np.zeros_like(alone.tokens)
    known = np.arange(rows.shape[1]) < alone.lengths[:, None]
    for number, row in zip(alone.requests, alone.last // rows.shape[1], strict=True):
        last = shared.last[shared.requests.index(number)]
        path = place[(place <= last) & (shared.ends[0] > last)]
        rows[row, : len(path)] = path
    at = torch.from_numpy(rows.ravel())
    same = {path: index[at.to(index.device)] for path, index in routing.items()}
    with repeated(model, same, torch.from_numpy(known.ravel())):
        return _hidden(model, alone)


def _difference(model: PreTrainedModel, expected: list[Tensor], found: list[Tensor]) -> str | None:
    """What is wrong with some numbers, if anything is."""
    allowed = EXACT if model.dtype == torch.float32 else ROUNDED
    error = _error(expected, found)
    # Written so that NaN is wrong.
    return None if error <= allowed else f"relative error {error:.2g}, allowed {allowed:.2g}"


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(expected, found, strict=True))


def _indistinct(
    model: PreTrainedModel,
    batch: Batch,
    expected: dict[int, Tensor],
    found: list[Tensor],
    masks: Masks,
) -> str | None:
    """Whether rounding to 16 bits could hide a mistake: without its mask a row must be far off."""
    if model.dtype == torch.float32:
        return None
    unmasked = _hidden(
        model, replace(batch, ends=np.full_like(batch.ends, batch.ends.shape[1])), masks
    )
    error = _error(list(expected.values()), found)
    wrong = _error(list(expected.values()), [unmasked[number] for number in expected])
    if DISTINCT * error <= wrong:
        return None
    return f"relative error {error:.2g}, which a mistake could explain: without a mask {wrong:.2g}"


def _interference(
    model: PreTrainedModel,
    batch: Batch,
    before: dict[int, Tensor],
    masks: Masks,
    routing: Choices,
) -> str | None:
    """Whether the row's last request changes with tokens that it does not contain, by one bit."""
    place = np.arange(batch.tokens.shape[1])
    last = batch.lengths[:, None] - 1
    strange = (place <= last) & (batch.ends <= last)
    changed = replace(batch, tokens=np.where(strange, batch.tokens[:, :1], batch.tokens))
    number = _last(batch)
    with repeated(model, routing, torch.from_numpy(strange.ravel())):
        after = _hidden(model, changed, masks)
    if torch.equal(before[number], after[number]):
        return None
    return "a branch depends on its neighbour"


class _Refusal(Exception):
    """A model that does not run what it is asked to."""


def _is_ours(error: BaseException) -> bool:
    """Whether an error from within a model's pass was raised by a hook of this package."""
    where = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # Where the model itself is called, arguments that it does not take show.
    return where[-1].startswith(_PACKAGE) and where[-1] != _CALLS


def _fault(attempt: Callable[[], str | None]) -> str | None:
    """What an attempt finds wrong, or how the model refuses it."""
    try:
        return attempt()
    except _Refusal as refusal:
        return str(refusal)
