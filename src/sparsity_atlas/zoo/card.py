"""What is known about a trained model: `training.json` for programs, `README.md` for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsity_atlas.zoo.bound import SAMPLES, Bound
from sparsity_atlas.zoo.loss import Loss
from sparsity_atlas.zoo.masked_training import CUT_ONCE_IN
from sparsity_atlas.zoo.recipe import Architecture, MaskedDiffusion, Mixture, Training, described
from sparsity_atlas.zoo.sparse.words import sparse_words
from sparsity_atlas.zoo.tokenizer import MASK

_CARD = """\
---
license: mit
language: en
pipeline_tag: text-generation
---

# Sparsity Atlas zoo: {name}

A small {form} language model ({nonlinearity}, tied embeddings, rotary
positions), {origin} to study activation sparsity, and of no use for
anything else.
{about}
| | |
|---|---|
| parameters | {total_parameters:,}, of them {non_embedding_parameters:,} outside the embedding\
{active_words} |
| shape | width {architecture[width]}, {architecture[layers]} layers, {heads}, {ffn} |
| tokenizer | byte-level BPE, {training[vocab_size]:,} tokens, shared by the zoo{mask_words} |
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
| steps | {steps_words} of {training[batch_tokens]:,} tokens |
| tokens seen | {tokens_seen:,} ({passes:.1f} times the corpus{before}) |
| optimizer | AdamW, betas {training[beta1]} and {training[beta2]}, weight decay \
{training[weight_decay]} on matrices |
| learning rate | {architecture[learning_rate]}, {warmup_steps} steps of warm-up, cosine to zero |
| gradient clip | {training[gradient_clip]} |
{balance_row}{objective_rows}{course_rows}\
| seed | {training[seed]} |
| arithmetic | {arithmetic}, torch {torch} |

Trained again{sameness} by

    sparsity-atlas zoo train --model {model} --corpus TRAIN --valid VALID --out DIR \\
        --steps {training[steps]} --batch-tokens {training[batch_tokens]} --seed {training[seed]}{options}

{loss_words}

{loss_table}

{load_table}{zeros_table}\
The loss during training stands in `training.json`.
"""

_LOSS = """\
## Loss

Of the stored weights, in float32, over consecutive blocks of {context} tokens, each
after `<|endoftext|>`."""

_BOUND = """\
## Bound on the loss

Of the stored weights, in float32, over consecutive blocks of {context} tokens, each after
`<|endoftext|>`: the mean loss over all orders in which a block's tokens can be filled in, by {samples} random
sets of masked tokens a block. It bounds from above what a causal model's card states exactly. The standard
error is over blocks."""

_OBJECTIVE = """\
| objective | masked diffusion (arXiv 2502.09992): of a sequence l random tokens are masked, l uniform and \
spread evenly over the batch; the loss is the mean over them |
| sequences | {whole:g} % whole windows, the others cut into texts that do not see each other: at each \
paragraph, and at one token in {cut_once_in} |
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
class Asked:
    """The command that trains a model: what `--model` names, and options that the recipe does not imply."""

    model: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One training: what was trained, on how much, and what came out.

    `source` says what the training text is; `prose` is the loss on further documents. `curve` holds (step,
    mean training loss in nats a token since the entry before). `load` is `expert_training.load` on the
    validation text, of a mixture, and `zeros` `sparse.zeros.measure`, where there can be any.
    `steps_done` are those of a checkpoint by the way (None: all); `course` is what
    `sparse.course.Course` says of itself.
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
    prose: Loss | None = None
    load: list[list[float]] | None = None
    zeros: list[float] | None = None
    steps_done: int | None = None
    course: dict[str, Any] = field(default_factory=dict)
    asked: Asked = Asked("")


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
        **_course_facts(record),
        "device": record.device,
        "torch": torch.__version__,
        "train": _rounded(record.train),
        "valid": _rounded(record.valid),
        **({"prose": _rounded(record.prose)} if record.prose else {}),
        **_mixture_facts(record),
        **({"zeros": [round(share, 5) for share in record.zeros]} if record.zeros else {}),
        "curve": [[step, round(value, 5)] for step, value in record.curve],
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def card(facts: dict[str, Any]) -> str:
    """The model card, from the content of `training.json`."""
    on_gpu = facts["device"] == "cuda"
    shape = described(facts["architecture"])
    known = {
        "model": facts["name"],
        "options": (),
        "steps_done": facts["training"]["steps"],
    } | facts
    return _CARD.format(
        **known | {"options": "".join(f" \\\n        {option}" for option in known["options"])},
        heads=f"{shape.heads} head{'s' * (shape.heads > 1)}",
        **_words(shape, known),
        warmup_steps=Training(**facts["training"]).warmup_steps,
        passes=facts["tokens_seen"] / facts["corpus_tokens"],
        arithmetic="bfloat16 autocast on one GPU" if on_gpu else "float32 on the CPU",
        sameness=" (on a GPU not to the bit)" if on_gpu else "",
    )


def _course_facts(record: Record) -> dict[str, Any]:
    """What was seen, and what was asked for beside the recipe."""
    done = record.training.steps if record.steps_done is None else record.steps_done
    asked = {"model": record.asked.model, "options": list(record.asked.options)}
    return {
        "steps_done": done,
        "tokens_seen": done * record.training.batch_tokens,
        **record.course,
        **(asked if record.asked.options else {}),
    }


def _mixture_facts(record: Record) -> dict[str, Any]:
    if not isinstance(record.architecture, Mixture) or record.load is None:
        return {}
    return {
        "active_parameters": record.architecture.active_parameters,
        "load": [[round(share, 5) for share in layer] for layer in record.load],
    }


def _words(shape: Architecture, facts: dict[str, Any]) -> dict[str, str]:
    """What cards of different kinds of models say otherwise."""
    context = facts["training"]["context"]
    # Later ones count.
    return {
        **{"form": "Llama-shaped", "ffn": f"FFN width {shape.ffn_width}"},
        **dict.fromkeys(("active_words", "mask_words", "balance_row", "objective_rows"), ""),
        **sparse_words(shape, facts),
        **{"load_table": "", "loss_words": _LOSS.format(context=context)},
        "loss_table": _loss_table(facts),
        **(_mixture_words(shape, facts) if isinstance(shape, Mixture) else {}),
        **(_diffusion_words(shape, facts) if isinstance(shape, MaskedDiffusion) else {}),
    }


def _loss_table(facts: dict[str, Any]) -> str:
    """Losses, with their standard errors where these are bounds."""
    texts = {
        "valid": "validation text",
        "train": "a sample of the training text",
        "prose": "the project's prose",
    }
    measured = {text: facts[key] for key, text in texts.items() if key in facts}
    columns = ["nats_per_token", "standard_error", "bits_per_byte"]
    columns = [name for name in columns if name in facts["valid"]]
    rows = [["text", "tokens", *(name.replace("_", " ") for name in columns)]]
    rows.append(["---"] * len(rows[0]))
    for text, loss in measured.items():
        rows.append([text, f"{loss['tokens']:,}", *(f"{loss[name]:.4f}" for name in columns)])
    joined = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join(joined).replace(" --- ", "---")


def _diffusion_words(shape: MaskedDiffusion, facts: dict[str, Any]) -> dict[str, str]:
    training = Training(**facts["training"])
    return {
        "form": "Llama-shaped masked-diffusion",
        "mask_words": f", and `{MASK}` (token {shape.mask_token(training)}), which no text has",
        "objective_rows": _OBJECTIVE.format(
            whole=100 - 100 * shape.short_texts, cut_once_in=CUT_ONCE_IN
        ),
        "loss_words": _BOUND.format(context=training.context - 1, samples=SAMPLES),
    }


def _mixture_words(shape: Mixture, facts: dict[str, Any]) -> dict[str, str]:
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
        **({"standard_error": round(loss.standard_error, 5)} if isinstance(loss, Bound) else {}),
    }
