"""What is known about a trained model: `training.json` for programs, `README.md` for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsity_atlas.zoo.loss import Loss
from sparsity_atlas.zoo.recipe import Architecture, Mixture, Training, described

_CARD = """\
---
license: mit
language: en
pipeline_tag: text-generation
---

# Sparsity Atlas zoo: {name}

A small {form} language model ({architecture[activation]} gate, tied embeddings, rotary
positions), trained from scratch by this project to study activation sparsity, and of no use for
anything else.

| | |
|---|---|
| parameters | {total_parameters:,}, of them {non_embedding_parameters:,} outside the embedding\
{active_words} |
| shape | width {architecture[width]}, {architecture[layers]} layers, {heads} heads, {ffn} |
| tokenizer | byte-level BPE, {training[vocab_size]:,} tokens, shared by the zoo |
| context | {training[context]} tokens |
| stored as | bfloat16; meant to be computed in float32 |

Begin every text with `<|endoftext|>` (token 0): each training sequence began with it, at the start
of a paragraph. The tokenizer does not add it by itself.

## Data

{source}: {corpus_tokens:,} tokens.

Curly quotes were made straight, whitespace inside a paragraph is one space, and paragraphs are
separated by one blank line.

## Training

| | |
|---|---|
| steps | {training[steps]:,} of {training[batch_tokens]:,} tokens |
| tokens seen | {tokens_seen:,} ({passes:.1f} times the corpus) |
| optimizer | AdamW, betas {training[beta1]} and {training[beta2]}, weight decay \
{training[weight_decay]} on matrices |
| learning rate | {architecture[learning_rate]}, {warmup_steps} steps of warm-up, cosine to zero |
| gradient clip | {training[gradient_clip]} |
{balance_row}\
| seed | {training[seed]} |
| arithmetic | {arithmetic}, torch {torch} |

Trained again{sameness} by

    sparsity-atlas zoo train --model {name} --corpus TRAIN --valid VALID --out DIR \\
        --steps {training[steps]} --batch-tokens {training[batch_tokens]} --seed {training[seed]}

## Loss

Of the stored weights, in float32, over consecutive blocks of {training[context]} tokens, each
after `<|endoftext|>`.

| text | tokens | nats per token | bits per byte |
|---|---|---|---|
| validation text | {valid[tokens]:,} | {valid[nats_per_token]:.4f} | {valid[bits_per_byte]:.4f} |
| a sample of the training text | {train[tokens]:,} | {train[nats_per_token]:.4f} | \
{train[bits_per_byte]:.4f} |

{load_table}\
The loss during training stands in `training.json`.
"""

_LOAD = """\
## Load

Of each layer's tokens of the validation text, the percentage that go to each expert; {even:g} were
even.

| layer | {numbers} |
|---|{rules}|
{rows}

"""


@dataclass(frozen=True)
class Record:
    """One training: what was trained, on how much, and what came out.

    `source` says what the training text is. `curve` holds (step, mean training loss in nats a
    token since the entry before). `load` is `expert_training.load` on the validation text, of a mixture.
    """

    name: str
    architecture: Architecture
    training: Training
    source: str
    total_parameters: int
    corpus_tokens: int
    device: str
    curve: list[tuple[int, float]]
    train: Loss
    valid: Loss
    load: list[list[float]] | None = None


def write(record: Record, folder: Path) -> None:
    """Write `training.json` and the model card into the model's folder."""
    facts = {
        "name": record.name,
        "architecture": asdict(record.architecture),
        "training": asdict(record.training),
        "source": record.source,
        "total_parameters": record.total_parameters,
        "non_embedding_parameters": record.architecture.non_embedding_parameters,
        "corpus_tokens": record.corpus_tokens,
        "tokens_seen": record.training.tokens,
        "device": record.device,
        "torch": torch.__version__,
        "train": _rounded(record.train),
        "valid": _rounded(record.valid),
        **_mixture_facts(record),
        "curve": [[step, round(value, 5)] for step, value in record.curve],
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def card(facts: dict[str, Any]) -> str:
    """The model card, from the content of `training.json`."""
    on_gpu = facts["device"] == "cuda"
    shape = described(facts["architecture"])
    return _CARD.format(
        **facts,
        heads=shape.heads,
        **_mixture_words(shape, facts),
        warmup_steps=Training(**facts["training"]).warmup_steps,
        passes=facts["tokens_seen"] / facts["corpus_tokens"],
        arithmetic="bfloat16 autocast on one GPU" if on_gpu else "float32 on the CPU",
        sameness=" (on a GPU not to the bit)" if on_gpu else "",
    )


def _mixture_facts(record: Record) -> dict[str, Any]:
    if not isinstance(record.architecture, Mixture) or record.load is None:
        return {}
    return {
        "active_parameters": record.architecture.active_parameters,
        "load": [[round(share, 5) for share in layer] for layer in record.load],
    }


def _mixture_words(shape: Architecture, facts: dict[str, Any]) -> dict[str, str]:
    """What the card says otherwise of a mixture."""
    if not isinstance(shape, Mixture):
        words = {"form": "Llama-shaped", "ffn": f"FFN width {shape.ffn_width}"}
        return {**words, "active_words": "", "balance_row": "", "load_table": ""}
    even = 100 * shape.active_experts / shape.experts
    rows = [
        " | ".join(["", str(layer), *(f"{100 * share:.1f}" for share in shares), ""]).strip()
        for layer, shares in enumerate(facts["load"])
    ]
    return {
        "form": "OLMoE-shaped",
        "ffn": f"{shape.experts} experts of width {shape.ffn_width}, {shape.active_experts} a token",
        "active_words": f", {shape.active_parameters:,} of these for one token",
        "balance_row": f"| load balance | each layer's loss (OLMoE's), weighed by {shape.balance:g} |\n",
        "load_table": _LOAD.format(
            even=even,
            numbers=" | ".join(map(str, range(shape.experts))),
            rules="---|" * (shape.experts - 1) + "---",
            rows="\n".join(rows),
        ),
    }


def _rounded(loss: Loss) -> dict[str, float]:
    return {
        "tokens": loss.tokens,
        "nats_per_token": round(loss.nats_per_token, 5),
        "bits_per_byte": round(loss.bits_per_byte, 5),
    }
