"""The logits of a model, a piece at a time and for the tokens that are asked for.

A vocabulary is wide: those of a batch at once would often be larger than the model. The model is run once
and its head shown the first piece of what it is to see. For each further piece the model's own class is
called again with its decoder standing still, so that whatever it does behind its head (soft caps, scales,
other types) is done as it does it. That this gives the same numbers is seen by `fault`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsity_atlas.models.memory import PIECE
from sparsity_atlas.sites.find import random_ids
from sparsity_atlas.sites.probe.hypotheses import relative_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative error that rounding explains: in float32, and in 16 bits.
EXACT, ROUNDED = 1e-5, 0.05
# How a model says that it does not take an argument, or trips over it.
REFUSALS = (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError)
# What transformers' classes call the number of last tokens whose logits they make; 0: of all.
KEEP = "logits_to_keep"
# Sequences and tokens that are tried, and tokens of a piece of them.
TRIED, TRIED_ROWS = (2, 12), 5

_able: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def vocabulary(model: PreTrainedModel) -> int:
    """Logits that a model gives for a token."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return len(weight) if weight is not None else model.config.get_text_config().vocab_size


def rows_of_a_piece(vocabulary: int, device: str) -> int:
    """Tokens whose logits are made at a time on a type of device; at least one."""
    return max(PIECE.get(device, PIECE["cpu"]) // vocabulary, 1)


def logits(
    model: PreTrainedModel, call: Callable[[], Tensor], where: Tensor, *, select: bool
) -> Iterator[Tensor]:
    """`pieces` where a model is able to, else cut from the logits of the whole batch.

    Args:
        model: the model.
        call: runs it on a batch [sequences, tokens] and returns its logits.
        where: int64 [wanted], indices of the tokens into the flattened batch; one at least.
        select: whether it is able to.
    """
    if select:
        return pieces(model, call, where)
    flat = call().flatten(0, 1)
    rows = rows_of_a_piece(flat.shape[-1], flat.device.type)
    return (flat[some] for some in where.split(rows))


def pieces(
    model: PreTrainedModel, call: Callable[[], Tensor], where: Tensor, rows: int | None = None
) -> Iterator[Tensor]:
    """Logits of some tokens of a forward pass, in order, [rows, vocabulary] each.

    The pass is made at once, the pieces when they are asked for; none is kept.

    Args:
        model: the model.
        call: as in `logits`.
        where: likewise.
        rows: tokens of a piece, at most; None: by the vocabulary and the device.
    """
    rows = rows or rows_of_a_piece(vocabulary(model), model.device.type)
    # As many as there must be, alike in size: a rest of few rows may be another kernel's, and slower.
    first, *others = torch.tensor_split(where, -(-len(where) // rows))
    rest: list[Tensor] = []
    outputs: dict[nn.Module, Any] = {}

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        (hidden,) = arguments
        flat = hidden.reshape(-1, hidden.shape[-1])
        # The head of a model that is spread over devices is on another one than its embedding.
        if others:
            rest.append(flat[torch.cat(others).to(flat.device)])
        return (flat[first.to(flat.device)][None],)

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        outputs[module] = _of_one_token(output)

    decoders = _decoders(model) if others else []
    handles = [one.register_forward_hook(keep) for one in decoders]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(select))
    try:
        made = [call()[0]]
    finally:
        for handle in handles:
            handle.remove()
    if not others:
        return iter(made)
    # What the class itself calls: the last one to return.
    decoder, output = list(outputs.items())[-1]

    def one_by_one() -> Iterator[Tensor]:
        # No name may hold a piece while the next one is made.
        yield made.pop()
        for hidden in rest.pop().split([len(one) for one in others]):
            yield _behind(model, decoder, output, hidden)

    return one_by_one()


def _behind(model: PreTrainedModel, decoder: nn.Module, output: Any, hidden: Tensor) -> Tensor:
    """What a model's class makes of hidden states [tokens, hidden] at its head.

    Args:
        model: the model.
        decoder: what its class calls.
        output: of the decoder, in a pass over another batch; the class gets it once more.
        hidden: what the head gets in place of it.
    """
    before = decoder.__dict__.get("forward")
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: (hidden[None],))
    decoder.forward = lambda *_, **__: output
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            # Past the hooks on the model itself, which count an evaluation's passes.
            made: Tensor = model.forward(ids, **without_cache(model)).logits[0]
            return made
    finally:
        handle.remove()
        del decoder.forward
        if before is not None:
            decoder.forward = before


def of_the_last(model: PreTrainedModel) -> dict[str, int]:
    """Arguments of a forward pass that asks for the last token's logits alone, and runs all in every layer.

    Gemma 4 runs that token alone through the layers that reuse earlier ones' keys: there all are asked for,
    and `shown_the_last` leaves that one.
    """
    if KEEP not in inspect.signature(model.forward).parameters:
        return {}
    inside = (one for one in model.modules() if one is not model)
    cut = any(KEEP in inspect.signature(one.forward).parameters for one in inside)
    return {KEEP: 0 if cut else 1}


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a forward pass that keeps no keys and values, where the model has a say in it."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def _decoders(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that a model's class may call for its hidden states."""
    found = [one for one in (model.base_model, model.get_decoder()) if one not in (None, model)]
    if not found:  # Llama 4's text model names itself: what it holds with an embedding is one
        found = [one for one in model.children() if getattr(one, "get_input_embeddings", None)]
    if not found:
        raise AttributeError(f"{type(model).__name__} names no decoder of its own")
    return list(dict.fromkeys(found))


def _of_one_token(output: Any) -> Any:
    """A decoder's output with the hidden states of one token only, in the form that it has."""
    if isinstance(output, Tensor):
        return output[:1, :1].clone()
    if isinstance(output, tuple):
        return (output[0][:1, :1].clone(), *output[1:])
    hidden = output.last_hidden_state[:1, :1].clone()
    return type(output)(**{**output, "last_hidden_state": hidden})


@contextmanager
def shown_the_last(model: PreTrainedModel) -> Iterator[None]:
    """Let the head see the last token of each sequence only, in every pass, where it is able to."""

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        (hidden,) = arguments
        return (hidden[:, -1:],)

    with ExitStack() as stack:
        if able(model):
            handle = model.get_output_embeddings().register_forward_pre_hook(select)
            stack.callback(handle.remove)
        yield


def able(model: PreTrainedModel) -> bool:
    """Whether `pieces` is right for a model; tried once, and first before anything is attached to it."""
    if model not in _able:
        _able[model] = fault(model) is None
    return _able[model]


def fault(model: PreTrainedModel) -> str | None:
    """What is wrong with logits made in pieces, seen on a few tokens; None: nothing is."""
    ids = random_ids(model, TRIED)
    options = without_cache(model)

    def call() -> Tensor:
        # Past the hooks on the model itself, which count an evaluation's passes.
        made: Tensor = model.forward(ids, **options).logits
        return made

    try:
        with torch.no_grad():
            whole = call().flatten(0, 1)
            # Not the first, and not in one stretch.
            where = torch.arange(1, len(whole), 2, device=whole.device)
            found = torch.cat(list(pieces(model, call, where, TRIED_ROWS)))
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as refusal:
        return f"{type(refusal).__name__}: {(str(refusal).splitlines() or [''])[0]}"
    if found.shape != whole[where].shape:
        return f"{list(found.shape)} logits where {list(whole[where].shape)} were expected"
    allowed = EXACT if model.dtype == torch.float32 else ROUNDED
    error = relative_error(whole[where], found)
    # Written so that NaN is wrong.
    return None if error <= allowed else f"relative error {error:.2g}, allowed {allowed:.2g}"
