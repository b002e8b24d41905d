"""Proof that a language model is causal: what it says at a token does not change with later ones.

Scores of a continuation mean nothing where each token sees those behind it. No setting tells which models
are causal, so a few forward passes do: a token is replaced, and the logits before it must stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.sites.find import forward_of, random_ids

SEQUENCES, TOKENS = 4, 16
# Names under which configurations state how many positions a model has.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Mean change of the logits, over their mean size, that rounding may make. It is a mean, since where types of
# 16 bits round a small change away in most logits, it moves the others by as much more.
ROUNDING = 1e-5
# A change is no rounding where it is this many times what the same pass differs from itself.
REPEATED = 10.0


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose logits depend on later tokens.

    Args:
        model: called as model(ids), in its own type and on its device.

    Raises:
        AtlasError: it is not causal, or it cannot be run.
        NumericalFailure: its logits are not numbers, so that nothing can be told.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = [getattr(text, name, None) for name in POSITIONS]
    length = min([TOKENS, *(size for size in known if isinstance(size, int) and size > 1)])
    ids = random_ids(model, (SEQUENCES, length))
    before = _logits(model, ids)
    noise = _change(model, before, _logits(model, ids))
    limit = torch.maximum(REPEATED * noise, torch.tensor(ROUNDING))
    # The last token, one in the middle, and the second, before which there is only the first.
    for place in sorted({length - 1, length // 2, 1}, reverse=True):
        changed = ids.clone()
        # Each sequence gets the token of another one, where that is another token.
        changed[:, place] = torch.where(
            ids[:, place] == ids[:, place].roll(1), ids[:, place - 1], ids[:, place].roll(1)
        )
        moved = _change(model, before, _logits(model, changed))[:place]
        if bool((moved > limit[:place]).any()):
            share = moved.max().item()
            raise AtlasError(
                f"{type(model).__name__}: not causal: another token at position {place} changes the "
                f"logits before it, by {share:.2g} of their size; only causal language models can be "
                f"evaluated{_kind(config, text)}"
            )


def _kind(config: Any, text: Any) -> str:
    """What kind of model it seems to be by its configuration."""
    for one in (config, text):
        masks = getattr(one, "mask_token_id", None) is not None
        if masks or getattr(one, "is_causal", None) is False:
            return ", and masked-diffusion models are not supported yet"
    if getattr(text, "is_decoder", None) is False:
        return "; is_decoder: true in its config.json makes it one, if it was trained as such"
    return ""


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocabulary] in float32.

    Raises:
        AtlasError: see `check_causal`.
    """
    try:
        with torch.no_grad():
            output = forward_of(model, ids)()
    except Exception as error:  # noqa: BLE001 (a model's own code may raise anything)
        reason = f"{type(error).__name__}: {error}"
        raise AtlasError(f"{type(model).__name__}: its forward pass fails: {reason}") from None
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.shape[:2] != ids.shape:
        raise AtlasError(f"{type(model).__name__}: its forward pass gives no logits for each token")
    return found.float()


def _change(model: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """Mean change of the logits at each position [tokens], over their mean size there.

    Sequences with a token whose logits are no numbers tell nothing: NaN spreads through masks, too.

    Raises:
        NumericalFailure: no sequence is without.
    """
    sound = (before.isfinite() & after.isfinite()).all((1, 2))
    if not sound.any():
        raise NumericalFailure(f"{type(model).__name__}: its logits hold NaN or an infinity")
    before, after = before[sound], after[sound]
    size = before.abs().mean((0, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return ((after - before).abs().mean((0, 2)) / size).cpu()
