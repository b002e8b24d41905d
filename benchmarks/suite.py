"""A suite of the paper's sizes, made here: nine tasks of generated text, their tokenizer, and models.

Eight tasks have the form and about the sizes of those that the paper runs (questions with options, sentences
with a gap, the last word of a passage), the ninth scores whole pages. Words are drawn from a lexicon by
Zipf's law and questions mean nothing: what is measured is time.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LEXICON = 20_000
MAX_LENGTH = 2048
SYLLABLES = [c + v for c, v in itertools.product("bcdfghjklmnprstvwxyz", "aeiou")]
# Of each page, whatever the scale.
PAGE_WORDS = 2600
FEWEST_DOCUMENTS = 4

Words = Callable[[int], str]


@dataclass(frozen=True)
class Sizes:
    """Of a task of questions.

    Attributes:
        documents: their number at scale 1.
        options: of each.
        context: words of a question, on average.
        answer: words of an option, on average.
    """

    documents: int
    options: int
    context: int
    answer: int


CHOICES = {
    "science_easy": Sizes(2376, 4, 18, 4),
    "science_hard": Sizes(1172, 4, 20, 5),
    "yes_or_no": Sizes(1100, 2, 110, 1),
    "physical": Sizes(1838, 2, 8, 15),
    "support": Sizes(1000, 4, 75, 2),
    "endings": Sizes(1700, 4, 30, 22),
}
GAPS = Sizes(1267, 2, 10, 8)
PASSAGES = Sizes(1600, 1, 60, 1)
PAGES = 60


def documents(scale: float) -> dict[str, list[dict[str, Any]]]:
    """Documents of each task, the same at each call."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, size in CHOICES.items():
        draw, words = _drawing(name)
        found[name] = [
            {
                "question": words(_about(draw, size.context)),
                "choices": [words(_about(draw, size.answer)) for _ in range(size.options)],
                "answer": draw.randrange(size.options),
            }
            for _ in range(_scaled(size.documents, scale))
        ]
    draw, words = _drawing("gaps")
    found["gaps"] = []
    for _ in range(_scaled(GAPS.documents, scale)):
        start = words(_about(draw, GAPS.context))
        beginnings = [f"{start} {words(1)}" for _ in range(GAPS.options)]
        rest = words(_about(draw, GAPS.answer))
        label = draw.randrange(GAPS.options)
        found["gaps"].append({"beginnings": beginnings, "label": label, "rest": rest})
    draw, words = _drawing("passages")
    found["passages"] = [
        {"text": words(_about(draw, PASSAGES.context)), "last": words(1)}
        for _ in range(_scaled(PASSAGES.documents, scale))
    ]
    draw, words = _drawing("pages")
    found["pages"] = [
        {"text": words(_about(draw, PAGE_WORDS))} for _ in range(_scaled(PAGES, scale))
    ]
    return found


def _scaled(count: int, scale: float) -> int:
    return max(round(count * scale), FEWEST_DOCUMENTS)


def _about(draw: random.Random, length: int) -> int:
    return draw.randint(max(length // 2, 1), max(3 * length // 2, 1))


def _drawing(name: str) -> tuple[random.Random, Words]:
    """A task's own stream of random numbers, and words drawn with it."""
    lexicon = random.Random("lexicon")
    every = [
        "".join(lexicon.choices(SYLLABLES, k=lexicon.choice((1, 2, 2, 3)))) for _ in range(LEXICON)
    ]
    often = list(itertools.accumulate(1 / (rank + 3) for rank in range(LEXICON)))
    draw = random.Random(name)
    return draw, lambda count: " ".join(draw.choices(every, cum_weights=often, k=count))


def write_tasks(folder: Path, scale: float) -> dict[str, dict[str, Any]]:
    """Write the tasks into a folder; entries of the configuration's `tasks`."""
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, dict[str, Any]] = {
        name: {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        for name in CHOICES
    }
    forms["gaps"] = {
        "output_type": "multiple_choice",
        "doc_to_text": "label",
        "doc_to_choice": "beginnings",
        "doc_to_target": "rest",
        "metric_list": [{"metric": "acc"}],
    }
    forms["passages"] = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' + last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    forms["pages"] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for name, some in documents(scale).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
        task = {
            "task": f"suite_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
            **forms[name],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return {name: {"task": f"suite_{name}", "include": str(folder)} for name in forms}


@functools.cache
def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many tokens: letters, syllables, and what these join to."""
    space = "Ġ"
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [*((one[0], one[1]) for one in SYLLABLES), *((space, one) for one in SYLLABLES)]
    pairs += [(space + one, two) for one, two in itertools.product(SYLLABLES, repeat=2)]
    pairs += itertools.product(SYLLABLES, repeat=2)
    pairs += [(space + a + b, c) for a, b, c in itertools.product(SYLLABLES, repeat=3)]
    merges = pairs[: vocabulary - len(special) - len(alphabet)]
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


SHAPES = {
    # So little to compute that what is left is the host's work.
    "tiny": {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    },
    # Of the ratio of a small model on a CPU.
    "small": {
        **{"model_type": "llama", "hidden_size": 256, "intermediate_size": 1024},
        **{"num_hidden_layers": 6, "num_attention_heads": 4},
    },
    "270m": {
        **{"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048},
        **{"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"head_dim": 256, "sliding_window": 512},
    },
}


def save_model(
    folder: Path, shape: str, vocabulary: int, seed: int, dtype: str, device: str = "cpu"
) -> Path:
    """Write a model of random weights, made on a device, with the suite's tokenizer."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        settings.pop("model_type"),
        vocab_size=vocabulary,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **settings,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)
    return folder
