"""What a model card says of a nonlinearity, of an FFN without a gate, and of a course beside the recipe."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from sparsity_atlas.loading.rectified import THRESHOLD
from sparsity_atlas.zoo.recipe import Architecture
from sparsity_atlas.zoo.sparse.variants import DRELU

_UNGATED = """
Its class is `ArceeForCausalLM` of transformers, which differs from the Llamas of the zoo in the FFN alone:
W_d σ(W_u x), half as wide again, so that it has as many weights as a gated one.
"""

_DRELU = """
Its class is this project's (`model_type: drelu_llama`): a Llama whose FFN is W_d(ReLU(W_u x) ⊙ ReLU(W_g x)).
Sparsity Atlas loads it; transformers by itself has no word for it.
"""

_FATRELU = """
Its gate is FATReLU, x if x ≥ {threshold:g}, else 0; `config.json` says `fatrelu`, with the threshold in
`{key}`, as published ProSparse checkpoints do. Sparsity Atlas loads it; transformers by itself has no
word for it.
"""

_CHECKPOINT = """
One of the checkpoints along a training, whose tokenizer lies in the folder above.
"""

_L1 = (
    "| L1 penalty | on what the down projections read, summed over layers; weight at steps {points}, "
    "between them along a sine (ProSparse, arXiv 2402.13516) |\n"
)

_ZEROS = """\
## Exact zeros

Of what each layer's down projection reads (`intermediate`), the percentage that is exactly zero on the
validation text; {mean:.1f} over all.

| layer | {numbers} |
|---|{rules}|
| zeros | {shares} |

"""


def sparse_words(shape: Architecture, facts: dict[str, Any]) -> dict[str, str]:
    """Of a card's fields, those that training for sparsity changes.

    Args:
        shape: the model.
        facts: of its `training.json`.
    """
    base, done, steps = facts.get("from"), facts["steps_done"], facts["training"]["steps"]
    nonlinearity, about = f"{shape.activation} gate", ""
    if not shape.gated:
        nonlinearity, about = f"an ungated {shape.activation} FFN", _UNGATED
    elif shape.activation == DRELU:
        nonlinearity, about = "ReLU on both factors", _DRELU
    elif "fatrelu" in facts:
        nonlinearity = "FATReLU gate"
        about = _FATRELU.format(threshold=facts["fatrelu"], key=THRESHOLD)
    if any(option.startswith("--checkpoints") for option in facts["options"]):
        about += _CHECKPOINT
    return {
        "nonlinearity": nonlinearity,
        "about": about,
        "origin": "trained from scratch by this project"
        if base is None
        else f"trained by this project from the weights of zoo-{base}",
        "steps_words": f"{steps:,}" if done == steps else f"{done:,} (of {steps:,})",
        "before": "" if base is None else f", beside those that {base} has seen",
        "course_rows": _L1.format(
            points=", ".join(f"{step:,}: {weight:g}" for step, weight in facts["l1"])
        )
        if "l1" in facts
        else "",
        "zeros_table": _zeros_table(facts["zeros"]) if "zeros" in facts else "",
        **({} if shape.gated else {"ffn": f"ungated FFN of width {shape.ffn_width}"}),
    }


def _zeros_table(zeros: list[float]) -> str:
    return _ZEROS.format(
        mean=100 * fmean(zeros),
        numbers=" | ".join(map(str, range(len(zeros)))),
        rules="---|" * (len(zeros) - 1) + "---",
        shares=" | ".join(f"{100 * share:.1f}" for share in zeros),
    )
