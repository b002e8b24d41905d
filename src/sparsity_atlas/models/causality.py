"""Proof of what kind a language model is: causal, or one in which each token sees all others.

Scores of a continuation mean nothing where each token sees those behind it, unless the continuation is
masked. No setting tells what a model does, so a few forward passes do: a token is replaced, and the logits
before it stay, or do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError, NumericalFailure
from sparsity_atlas.sites.find import forward_of, random_ids, sees_earlier_only
from sparsity_atlas.terms import CAUSAL, DIFFUSION

SEQUENCES, TOKENS = 4, 16
# Names under which configurations state how many positions a model has.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Mean change of the logits, over their mean size, that rounding may make. It is a mean, since where types of
# 16 bits round a small change away in most logits, it moves the others by as much more.
ROUNDING = 1e-5
# A change is no rounding where it is this many times what the same pass differs from itself.
REPEATED = 10.0
# bitsandbytes in 8 bits takes the columns that have a large entry anywhere in a batch as they are.
_PACKED = (
    "; it runs packed, and its kernels may round a token by all others of its batch: with dequantise: true "
    "in the model's entry it is computed in plain numbers"
)
NOT_YET = (
    "a masked-diffusion model: the pipeline evaluates and captures it, but calibrates nothing for it, and "
    "does not take its layers one at a time"
)


def kind_of(model: nn.Module, mask_token: int | None = None) -> str:
    """What a model is: `causal`, or `diffusion`, one that sees all tokens and predicts the masked ones.

    Args:
        model: called as model(ids), in its own type and on its device.
        mask_token: id of the mask, where the model's entry names it; else its configuration may.

    Returns:
        One of `terms.KINDS`.

    Raises:
        AtlasError: it is neither: it sees later tokens and has no mask, or its configuration does not say
            `is_causal: false`; it is causal where it is said not to be; or it cannot be run.
        NumericalFailure: its logits are not numbers, so that nothing can be told.
    """
    text = _configs(model)[1]
    name = type(model).__name__
    declared = not sees_earlier_only(text)
    mask = mask_token_of(model, mask_token) if declared or mask_token is not None else None
    seen = _sees_later(model)
    if seen is None:
        if mask_token is not None or (declared and mask is not None):
            said = "is_causal: false" if declared else f"mask_token_id: {mask_token}"
            raise AtlasError(
                f"{name}: {said} found, but it is causal: no other token changes the logits before it"
            )
        return CAUSAL
    place, share, first = seen
    what = (
        f"{name}: not causal: another token at position {place} changes the logits before it, by "
        f"{share:.2g} of their size"
    )
    if not declared:
        advice = "; is_decoder: true in its config.json makes it one, if it was trained as such"
        hint = advice if getattr(text, "is_decoder", None) is False else ""
        if getattr(model, "is_quantized", False):
            hint = f"{hint}{_PACKED}"
        raise AtlasError(
            f"{what}; only causal language models and masked-diffusion models (is_causal: false) can be "
            f"evaluated{hint}"
        )
    if mask is None:
        raise AtlasError(
            f"{what}, and a masked-diffusion model needs a mask token: say mask_token_id in the model's "
            "entry, or in its config.json"
        )
    if not first:
        raise AtlasError(
            f"{what}, but the last token does not change the first one's; in a masked-diffusion model each "
            "token sees all others"
        )
    return DIFFUSION


def describe_kind(
    model: nn.Module, kind: str, mask_token: int | None, shifted: bool
) -> dict[str, Any]:
    """What a manifest says of a model's kind, and what a masked-diffusion model is asked with.

    Args:
        model: of that kind.
        kind: as `kind_of` found it.
        mask_token: id of the mask, where the model's entry names it.
        shifted: whether the logits at a token are of its successor; it cannot be seen in the model.
    """
    if kind == CAUSAL:
        return {"kind": kind}
    return {
        "kind": kind,
        "mask_token_id": mask_token_of(model, mask_token),
        "shifted_logits": shifted,
    }


def mask_token_of(model: nn.Module, mask_token: int | None = None) -> int | None:
    """Id of the mask: as the model's entry has it, else as its configuration.

    Raises:
        AtlasError: it is no id, or of no token that the model has.
    """
    config, text = _configs(model)
    found = mask_token
    for one in (config, text):
        found = getattr(one, "mask_token_id", None) if found is None else found
    rows = getattr(text, "vocab_size", None)
    if found is not None and (type(found) is not int or found < 0 or found >= (rows or found + 1)):
        most = "" if rows is None else f" from 0 to {rows - 1}"
        raise AtlasError(
            f"{type(model).__name__}: mask_token_id: expected the id of a token{most}, found {found!r}"
        )
    return found


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """A model's configuration, and that of the part that reads text."""
    config: Any = getattr(model, "config", None)
    return config, config.get_text_config() if hasattr(config, "get_text_config") else config


def _sees_later(model: nn.Module) -> tuple[int, float, bool] | None:
    """Which token changes logits before it, by how much of their size, and whether the first are among them.

    None: there is no such token. See `kind_of` for what is raised.
    """
    known = [getattr(_configs(model)[1], name, None) for name in POSITIONS]
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
            first = place == length - 1 and bool(moved[0] > limit[0])
            return place, moved.max().item(), first
    return None


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocabulary] in float32.

    Raises:
        AtlasError: see `kind_of`.
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
