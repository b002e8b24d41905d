"""A tiny random language model with its tokenizer, and lm-eval tasks on made-up sentences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sparsity_atlas.evaluation.evaluate import Session
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.models.manifest import describe

MAX_LENGTH = 48
TEXT = (
    "the old cat sees a young bird near the river today but it never finds the small green house "
    "because they often hide behind a tree or under the stone door and we like the lamp over there"
)
WORDS = TEXT.split()
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def sentences(count: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[str]:
    """Word salad, the same at each call."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(count)]


def tiny_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `bos` it puts <s> first by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(300), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT if chat else None,
    )


def save_model(
    folder: Path,
    *,
    seed: int = 0,
    bos: bool = False,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    kind: str = "llama",
    **settings: Any,
) -> Path:
    """Write a random Llama of 30,000 parameters, or another kind of decoder, into `folder`."""
    tokenizer = tiny_tokenizer(bos=bos, chat=chat)
    config = AutoConfig.for_model(
        kind,
        **{
            **{"vocab_size": 300, "hidden_size": 24, "intermediate_size": 40},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3},
            **{"max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": False},
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            **settings,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        # So that greedy generation ends by itself now and then.
        model.get_output_embeddings().weight[2] *= 2.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_model_manifest(folder: Path, path: Path, **allowed: bool) -> Path:
    """The manifest that stage `models` writes for a local folder."""
    source = {"name": folder.name, "source": {"path": str(folder), **allowed}, "revision": None}
    checkpoint = Checkpoint(folder, **allowed)
    write_manifest(path, {**source, "digest": checkpoint.digest(), **describe(checkpoint, None)})
    return path


def settings(tasks: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What `grid.evaluation_slice` gives a stage."""
    return {
        **{"dtype": "auto", "device": "cpu", "batch_size": 4, "add_bos_token": None},
        **{"apply_chat_template": False, "max_length": None, "seed": 1234, "tasks": tasks},
        **changes,
    }


def open_session(
    manifest: Path, tasks: dict[str, dict[str, Any]], code: str = "test", **changes: Any
) -> Session:
    """A session on the CPU."""
    return Session.open(manifest, settings(tasks, **changes), code)


def write_task(
    folder: Path, name: str, documents: list[dict[str, Any]], **config: Any
) -> dict[str, Any]:
    """Write an lm-eval task with its data beside it; returns its entry of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(lines)
    content = {
        "task": name,
        "dataset_path": "json",
        # Absolute, so that plain lm-eval finds it from any working directory.
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {"task": name, "include": str(folder)}


def _choices(count: int, options: Iterator[list[str]], seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"context": context, "choices": choices, "label": draw.randrange(len(choices))}
        for context, choices in zip(sentences(count, seed), options, strict=False)
    ]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def choice_documents(count: int = 14, seed: int = 5) -> list[dict[str, Any]]:
    """Options of several tokens, two to four of them."""
    draw = random.Random(seed)
    options = (
        [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(2, 4))]
        for _ in range(count)
    )
    return _choices(count, options, seed)


def letter_documents(count: int = 10, seed: int = 6) -> list[dict[str, Any]]:
    """Options of one token: their requests share one row of a batch."""
    return _choices(count, iter([["A", "B", "C", "D"]] * count), seed)


def rolling_documents(count: int = 6, seed: int = 7) -> list[dict[str, Any]]:
    """Documents, most of them longer than the model's context."""
    return [{"page": text} for text in sentences(count, seed, 5, 90)]


ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{page.rsplit(' ', 1)[0]}}",
    "doc_to_target": "{{' ' + page.rsplit(' ', 1)[1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{page}}",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
    ],
}


def run_stage(module: Any, arguments: dict[str, Any]) -> None:
    """A stage by its command line."""
    with pytest.MonkeyPatch.context() as patch:
        flat = [str(one) for pair in arguments.items() for one in pair]
        patch.setattr("sys.argv", ["stage", *flat])
        module.main()
