"""The training loop: a fresh model, its schedule, its loss, its optimizer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.arcee.configuration_arcee import ArceeConfig
from transformers.models.arcee.modeling_arcee import ArceeForCausalLM
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.pretrained import moved
from sparsity_atlas.loading.rectified import DReLULlamaConfig, DReLULlamaForCausalLM
from sparsity_atlas.zoo import batches, expert_training, masked_training, recipe
from sparsity_atlas.zoo.sparse import penalty
from sparsity_atlas.zoo.sparse.course import Course, begin_with
from sparsity_atlas.zoo.sparse.state import State
from sparsity_atlas.zoo.sparse.variants import DRELU
from sparsity_atlas.zoo.tokenizer import END_OF_TEXT_ID

log = logging.getLogger(__name__)

_REPORT_EVERY = 200

Model: TypeAlias = LlamaForCausalLM | ArceeForCausalLM | OlmoeForCausalLM
Curve: TypeAlias = list[tuple[int, float]]


def build_model(shape: recipe.Architecture, training: recipe.Training) -> Model:
    """A freshly initialised model; the same seed gives the same weights, whatever the activation or the kind.

    No padding token is set: torch would keep its embedding, which is also the one that begins
    every sequence, at zero.
    """
    common: dict[str, Any] = {
        "vocab_size": training.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": shape.activation,
        "max_position_embeddings": training.context,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": None,
    }
    torch.manual_seed(training.seed)
    model: Model
    if isinstance(shape, recipe.Mixture):
        model = OlmoeForCausalLM(
            OlmoeConfig(
                num_experts=shape.experts,
                num_experts_per_tok=shape.active_experts,
                router_aux_loss_coef=shape.balance,
                **common,
            )
        )
    elif not shape.gated:
        # A Llama but for its FFN, W_d σ(W_u x).
        model = ArceeForCausalLM(
            ArceeConfig(head_dim=recipe.HEAD_WIDTH, rms_norm_eps=LlamaConfig.rms_norm_eps, **common)
        )
    elif shape.activation == DRELU:
        common["hidden_act"] = "relu"
        model = DReLULlamaForCausalLM(DReLULlamaConfig(head_dim=recipe.HEAD_WIDTH, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(head_dim=recipe.HEAD_WIDTH, **common))
    if isinstance(shape, recipe.MaskedDiffusion):
        mask = shape.mask_token(training)
        model.resize_token_embeddings(mask + 1, mean_resizing=False)
        model.config.is_causal, model.config.mask_token_id = False, mask
    model.generation_config.pad_token_id = END_OF_TEXT_ID
    return model


def learning_rate(step: int, peak: float, training: recipe.Training) -> float:
    """Linear warm-up, then half a cosine down to zero at the end. Steps count from 0."""
    warmup = training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, training.steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class BatchLoss(NamedTuple):
    """`entropy` is the mean cross entropy in nats a token; `total` is what training lowers."""

    entropy: torch.Tensor
    total: torch.Tensor


def batch_loss(
    model: Model, inputs: torch.Tensor, targets: torch.Tensor, l1: torch.Tensor | None = None
) -> BatchLoss:
    """The loss of a batch; inputs and targets are (sequences, context).

    Runs the layers one by one without an attention mask. The model's own forward builds a mask
    once it is compiled, and a mask rules out the fast causal attention. A mixture's total has the
    mean of its layers' `unevenness` in it; with a weight `l1` (a scalar) a dense model's has the sum of
    its layers' L1 norms.
    """
    hidden = model.model.embed_tokens(inputs)
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    uneven, norms = [], []
    for layer in model.model.layers:
        if l1 is not None:
            hidden, norm = penalty.layer_pass(layer, hidden, rotary)
            norms.append(norm)
        elif isinstance(model, OlmoeForCausalLM):
            hidden, unevenness = expert_training.layer_pass(layer, hidden, rotary)
            uneven.append(unevenness)
        else:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits = model.lm_head(model.model.norm(hidden))
    entropy = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    if l1 is not None:
        return BatchLoss(entropy, entropy + l1 * torch.stack(norms).sum())
    if not uneven:
        return BatchLoss(entropy, entropy)
    weight: float = model.config.router_aux_loss_coef
    return BatchLoss(entropy, entropy + weight * torch.stack(uneven).mean())


def masked_loss(model: LlamaForCausalLM, *batch: torch.Tensor) -> BatchLoss:
    """`masked_training.masked_loss` of a batch, which is all that training lowers."""
    bound = masked_training.masked_loss(model, *batch)
    return BatchLoss(bound, bound)


def objective(
    shape: recipe.Architecture, tokens: batches.Tokens, training: recipe.Training
) -> tuple[Iterator[tuple[np.ndarray, ...]], Callable[..., BatchLoss]]:
    """What a model is trained on, without end, and the loss of one of these with the model before it."""
    drawn = (tokens, training.context, training.sequences, training.seed)
    if isinstance(shape, recipe.MaskedDiffusion):
        return masked_training.masked_batches(
            *drawn, mask_token=shape.mask_token(training), short_texts=shape.short_texts
        ), masked_loss
    return batches.training_batches(*drawn), batch_loss


def optimizer_for(
    model: Model, peak: float, training: recipe.Training, device: torch.device
) -> torch.optim.AdamW:
    """AdamW; matrices are decayed, the gains of the norms are not."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(groups, lr=peak, betas=betas, fused=device.type == "cuda")


def fit(
    model: Model,
    tokens: batches.Tokens,
    shape: recipe.Architecture,
    training: recipe.Training,
    device: torch.device,
    course: Course | None = None,
    keep: Callable[[int, Curve], object] | None = None,
    state: State | None = None,
) -> Curve:
    """Train in place. Returns (step, mean loss in nats a token since the last entry) pairs.

    On CUDA in bfloat16 autocast and compiled, elsewhere plainly in float32. AtlasError when the
    loss is no longer finite.

    Args:
        model: of `build_model`.
        tokens: the training text.
        shape: the model's.
        training: the settings.
        device: where.
        course: what it does beside the recipe.
        keep: is called after each of the course's `checkpoints`, with the steps done and the curve so far.
        state: where the training is kept, and goes on from.
    """
    course = course or Course()
    on_gpu = device.type == "cuda"
    moved(model, device).train()
    optimizer = optimizer_for(model, shape.learning_rate, training, device)
    source, plain_loss = objective(shape, tokens, training)
    step_loss = torch.compile(plain_loss, dynamic=False) if on_gpu else plain_loss
    if course.base is not None:
        begin_with(model, course.base)
    entry_step, curve = state.load(model, optimizer) if state else (0, [])
    for _ in range(entry_step):
        next(source)
    since_last = torch.zeros((), device=device)
    l1 = [torch.zeros((), device=device)] * (course.l1 is not None)
    entry_time = time.perf_counter()
    for step in range(entry_step, training.steps):
        batch = [torch.from_numpy(array) for array in next(source)]
        if on_gpu:
            batch = [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, shape.learning_rate, training)
        if course.l1 is not None:
            l1[0].fill_(course.l1.weight(step))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            value = step_loss(model, *batch, *l1)
        value.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        since_last += value.entropy.detach()
        done = step + 1
        if done % _REPORT_EVERY == 0 or done == training.steps:
            mean = since_last.item() / (done - entry_step)
            if not math.isfinite(mean):
                raise AtlasError(f"training diverged before step {done}: loss {mean}")
            curve.append((done, mean))
            rate = (done - entry_step) * training.batch_tokens / (time.perf_counter() - entry_time)
            log.info("step %d of %d: loss %.4f, %.0f tokens/s", done, training.steps, mean, rate)
            since_last.zero_()
            entry_step, entry_time = done, time.perf_counter()
            if state is not None and done % state.every == 0 and done < training.steps:
                state.save(done, model, optimizer, curve)
        if keep is not None and done in course.checkpoints:
            keep(done, list(curve))
    return curve
