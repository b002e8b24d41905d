"""What other papers print of models that anybody can run, to stand beside our own.

Only what was printed or drawn: nothing here is computed. Critical sparsities of arXiv 2509.00454 for the
headline table are in `published`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_atlas.tables.sparsing_law import LARGEST, LARGEST_SPARSITY, PUBLISHED_FITS
from sparsity_atlas.tables.sparsing_law import SOURCE as SPARSING_LAW

PERPLEXITY, ACCURACY, ZEROS, CRITICAL = "perplexity", "accuracy", "zeros", "critical"
PPL_SPARSITY, LIMIT = "ppl_sparsity", "limit"

_TEAL = "TEAL, arXiv 2408.14690"
_CATS = "CATS, arXiv 2404.08763"
_R_SPARSE = "R-Sparse, arXiv 2504.19449"
_PROSPARSE = "ProSparse, arXiv 2402.13516"
_LLADA = "arXiv 2509.00454, masked-diffusion part, copied second-hand"
_GEMMA = (
    "arXiv 2509.00454, one task, read off a figure of the authors' blog, ±1 point; that its markers are "
    "Gemma 3 is inferred"
)
_PREDICTABILITY = "github.com/Bulut421/activation-sparsity-predictability, README"
_INPUTS = "inputs of all linear maps, WikiText-2 as the paper cuts it; of prompts half stays dense"
_FIT = "PPL-1% at checkpoints"
_MEAN = "mean of the paper's tasks with its own shots"


@dataclass(frozen=True)
class Score:
    """One published number of a model under a rule.

    model: on the Hub.
    rule: built-in rule that is its nearest here; empty: of the untouched model.
    site: in our terms.
    quantity: PERPLEXITY and ACCURACY (percent) at a sparsity; ZEROS: sparsity in percent, of the rule at a
        level, else exact zeros; CRITICAL: percent, at 99 % of dense accuracy; PPL_SPARSITY: percent, where
        perplexity is 1 % higher; LIMIT: percent, of the activation ratio there, that a training goes to.
    task: that it is of; empty: the paper's mean, or its text.
    at: sparsity from 0 to 1, or the rule's level of ZEROS; else None.
    dense: the same of the untouched model, where it is printed.
    value: the number.
    source: where it is from.
    setting: what is not the same here.
    """

    model: str
    rule: str
    site: str
    quantity: str
    task: str
    at: float | None
    dense: float | None
    value: float
    source: str
    setting: str = ""


def _along(
    model: str, rule: str, site: str, quantity: str, dense: float, values: dict[float, float]
) -> list[tuple[str, str, str, str, str, float, float, float]]:
    return [(model, rule, site, quantity, "", at, dense, value) for at, value in values.items()]


SCORES: tuple[Score, ...] = (
    *(
        Score(*row, _TEAL, _INPUTS)
        for row in (
            *_along(
                *("meta-llama/Meta-Llama-3-8B", "teal", "all_linear_inputs", PERPLEXITY, 5.87),
                {0.25: 5.94, 0.4: 6.21, 0.5: 6.67},
            ),
        )
    ),
    *(
        Score(*row, _TEAL, f"{_MEAN}; inputs of all linear maps")
        for row in _along(
            *("meta-llama/Meta-Llama-3-8B", "teal", "all_linear_inputs", ACCURACY, 68.07),
            {0.4: 66.21},
        )
    ),
    *(
        Score(*row, _CATS, _MEAN)
        for row in (
            *_along("mistralai/Mistral-7B-v0.1", "cats", "gate", ACCURACY, 69.94, {0.5: 68.90}),
            *_along("meta-llama/Llama-2-7b-hf", "cats", "gate", ACCURACY, 65.89, {0.5: 64.33}),
        )
    ),
    *(
        Score(model, "r_sparse", "all_linear_inputs", ACCURACY, "", 0.5, *ends, _R_SPARSE, _MEAN)
        for model, ends in {
            "meta-llama/Llama-2-7b-hf": (65.88, 64.06),
            "meta-llama/Meta-Llama-3-8B": (69.44, 66.20),
            "mistralai/Mistral-7B-v0.1": (69.89, 68.39),
        }.items()
    ),
    *(
        Score(
            model, "", "intermediate", ZEROS, "", None, None, share, _PROSPARSE, "the paper's text"
        )
        for model, share in {
            "SparseLLM/ReluLLaMA-7B": 66.98,
            "SparseLLM/prosparse-llama-2-7b": 89.32,
            "SparseLLM/prosparse-llama-2-13b": 88.80,
            "openbmb/MiniCPM-S-1B-sft": 87.89,
        }.items()
    ),
    *(
        Score(
            *("SparseLLM/prosparse-llama-2-7b", "threshold", "gate", ZEROS, "", level, None),
            *(share, _PROSPARSE, "FATReLU at this threshold; the paper's text"),
        )
        for level, share in {0.005: 88.62, 0.01: 89.32, 0.02: 90.35, 0.03: 90.95}.items()
    ),
    *(
        # Printed as a rise in percent: 100 is the dense model's.
        Score(
            *("Qwen/Qwen2.5-3B", "topk", "intermediate", PERPLEXITY, "", at),
            *(100.0, value, _PREDICTABILITY, "printed as a rise of the perplexity in percent"),
        )
        for at, value in {0.5: 102.4, 0.6: 107.2, 0.7: 120.7, 0.8: 164.8}.items()
    ),
    *(
        Score("GSAI-ML/LLaDA-8B-Base", "topp", site, CRITICAL, task, None, None, value, _LLADA)
        for site, values in {
            "intermediate": {
                **{"mmlu": 69.46, "humaneval": 81.25, "hellaswag": 71.21, "mbpp": 66.67},
                "": 68.13,
            },
            "all_inputs": {
                **{"mmlu": 62.72, "humaneval": 77.89, "hellaswag": 67.92, "mbpp": 59.18},
                "": 56.79,
            },
        }.items()
        for task, value in values.items()
    ),
    *(
        Score(
            f"google/gemma-3-{size}-pt",
            "topp",
            "intermediate",
            CRITICAL,
            task,
            None,
            None,
            value,
            _GEMMA,
        )
        for task, values in {
            "lambada": (40.4, 45.5, 60.6, 69.6),
            "hellaswag": (55.5, 66.9, 75.4, 81.5),
        }.items()
        for size, value in zip(("1b", "4b", "12b", "27b"), values, strict=True)
    ),
    *(
        Score(
            *(one.hub, "cett", "intermediate", LIMIT, "", None, None, 100 * one.limit),
            *(SPARSING_LAW, f"{one.law} fitted to {_FIT} of one training on the authors' texts"),
        )
        for one in PUBLISHED_FITS
    ),
    Score(
        *(LARGEST, "cett", "intermediate", PPL_SPARSITY, "", None, None, LARGEST_SPARSITY),
        *(SPARSING_LAW, "the authors' texts"),
    ),
)
