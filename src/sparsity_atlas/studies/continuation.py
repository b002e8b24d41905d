"""Sequences whose end a model writes itself: the same tokens in any batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor, prompt: int, batch: int, seed: int) -> Tensor:
    """Sequences of which all tokens behind the prompt are drawn from the model, at temperature 1.

    Draws depend on the seed, the sequence's number and the token's position alone. End tokens are not
    drawn, since what is measured needs sequences of one length.

    Args:
        model: dense, causal.
        ids: int64 [sequences, positions].
        prompt: tokens of each that stay.
        batch: sequences a forward pass.
        seed: of the draws.

    Returns:
        int64 [sequences, positions], on the CPU.
    """
    # What a model's own configuration may ask for otherwise.
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    plain |= {"no_repeat_ngram_size": 0, "return_dict_in_generate": False, "use_cache": True}
    settings = GenerationConfig(max_new_tokens=ids.shape[1] - prompt, pad_token_id=0, **plain)
    generate: Any = model.generate
    found = []
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch, :prompt].to(model.device)
        draws = _Draws(seed, range(start, start + len(rows)), _ends(model))
        made = generate(
            rows,
            generation_config=settings,
            attention_mask=torch.ones_like(rows),
            logits_processor=LogitsProcessorList([draws]),
        )
        found.append(made.cpu())
    return torch.cat(found)


class _Draws(LogitsProcessor):
    """Adds Gumbel noise, so that the largest logit is a draw of their softmax."""

    def __init__(self, seed: int, numbers: range, never: list[int]) -> None:
        self._draws = [np.random.default_rng([seed, number]) for number in numbers]
        self._never = never

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([draw.gumbel(size=scores.shape[-1]) for draw in self._draws])
        found = scores.double().cpu() + torch.from_numpy(noise)
        found[:, self._never] = -torch.inf
        # Where they go there may be no float64 (Apple's MPS); a draw is told apart in float32, too.
        return found.float().to(scores.device)


def _ends(model: PreTrainedModel) -> list[int]:
    ends: list[int] = []
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        ends += found if isinstance(found, list) else [] if found is None else [found]
    return ends
