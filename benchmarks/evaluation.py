"""One node of multiple-choice requests: ours against lm-eval's HFLM over the same model.

    python benchmarks/evaluation.py                                 # zoo-medium on the CPU
    python benchmarks/evaluation.py --shape llama-1b --device cuda --dtype bfloat16 --batch-size 64

Questions are pieces of this project's prose with four options each. HFLM does what it does for every node:
build and tokenise the requests, run them, make the metrics; it counts no zeros. Ours counts them, journals
each batch and writes the sample table and eval.json; requests were built once before, as in a search, and
the time for that is given. Repetitions take turns, and medians are compared; on a machine with other work
look at the processors' time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsity_atlas.evaluation.evaluate import Session, evaluate_node
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.lm.model import AtlasLM
from sparsity_atlas.loading.checkpoint import Checkpoint, load, load_tokenizer
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import sparsified
from sparsity_atlas.tasks.load import load_tasks

ROOT = Path(__file__).parents[1]
PROSE = ROOT / "workflow/resources/text/prose.jsonl"
TASK = {
    "task": "questions",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# Layers, hidden width, FFN width, heads, key-value heads.
SHAPES = {"llama-1b": (16, 2048, 8192, 32, 8), "llama-8b": (32, 4096, 14336, 32, 8)}
OPTIONS = 4


def questions(count: int, context: int, option: int) -> list[dict[str, Any]]:
    """Questions of about so many words, from half as many on to half as many more."""
    texts = [json.loads(line)["text"] for line in PROSE.read_text("utf-8").splitlines()]
    words = " ".join(texts).split()
    draw = random.Random(0)

    def piece(length: int) -> str:
        size = draw.randint(max(length // 2, 1), 3 * length // 2)
        start = draw.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    return [
        {
            "context": piece(context),
            "choices": [piece(option) for _ in range(OPTIONS)],
            "answer": draw.randrange(OPTIONS),
        }
        for _ in range(count)
    ]


def of_shape(name: str, dtype: str, device: str) -> PreTrainedModel:
    """A Llama of a real one's shape with random weights."""
    layers, hidden, width, heads, groups = SHAPES[name]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
        tie_word_embeddings=name == "llama-1b",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def seconds(work: Callable[[], Any], device: str) -> tuple[tuple[float, float], Any]:
    """Time of one call, by the clock and of the processors, and what it returned."""
    began = time.perf_counter(), time.process_time()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began[0], time.process_time() - began[1]), result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "workflow/resources/zoo/medium")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights in place of the model's own"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--context", type=int, default=40, help="words of a question, about")
    parser.add_argument("--option", type=int, default=6, help="words of an option, about")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--site", default="intermediate")
    parser.add_argument("--level", default="0.9")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    # Requests are built here and now, whatever an earlier run left.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    documents = questions(arguments.requests // OPTIONS, arguments.context, arguments.option)
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (folder / "questions.yaml").write_text(yaml.safe_dump(TASK))
    entry = {"questions": {"task": "questions", "include": str(folder)}}
    ours, theirs = (load_tasks(entry, 0) for _ in range(2))

    device, dtype = arguments.device, arguments.dtype
    model = (
        of_shape(arguments.shape, dtype, device)
        if arguments.shape
        else load(Checkpoint(arguments.model), dtype=dtype, device=device)
    )
    tokenizer = load_tokenizer(Checkpoint(arguments.model))
    parts = find_parts(model)
    size = arguments.batch_size
    lm = AtlasLM(model, tokenizer, batch_size=size, max_length=2048 if arguments.shape else None)
    session = Session(lm, parts, ours, 0, False, {})
    plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
    nodes = {
        "dense": None,
        f"top-p {arguments.level} at {arguments.site}": Node.make(
            {"rule": "topp"}, arguments.site, arguments.level
        ),
    }
    building, prepared = seconds(lambda: session.prepared("questions"), device)

    def run_theirs(node: Node | None) -> dict[str, Any]:
        attached = (
            sparsified(model, parts, node.site, node.rule, float(node.level))
            if node
            else contextlib.nullcontext()
        )
        with attached:
            return evaluator.evaluate(plain, theirs["questions"].contents, bootstrap_iters=0)

    def run_ours(node: Node | None) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            return evaluate_node(session, node, Path(place))

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{arguments.shape or arguments.model.name}, {dtype}, {arguments.requests} requests, "
        f"batch size {size}"
    )
    (batches,) = prepared.work.batches.values()
    asked, run = (
        sum(int(batch.run.sum()) for batch in batches),
        sum(batch.tokens.size for batch in batches),
    )
    print(
        f"tokens: {asked:,} in all requests, {run:,} run with padding; built in {building[1]:.2f} s"
    )
    for title, node in nodes.items():
        times: dict[str, list[tuple[float, float]]] = {"HFLM": [], "ours": []}
        results: dict[str, Any] = {}
        for number in range(arguments.repeats + 1):
            for who, work in (("HFLM", run_theirs), ("ours", run_ours)):
                taken, results[who] = seconds(lambda work=work, node=node: work(node), device)
                if number:  # the first warms up
                    times[who].append(taken)
        for kind, clock in enumerate(("wall", "CPU")):
            theirs_took, ours_took = (
                statistics.median(one[kind] for one in times[who]) for who in ("HFLM", "ours")
            )
            print(
                f"{title:<28} {clock:<4} HFLM {theirs_took:8.2f} s   ours {ours_took:8.2f} s   "
                f"ratio {theirs_took / ours_took:5.2f}",
                flush=True,
            )
        acc = (
            results["HFLM"]["results"]["questions"]["acc,none"],
            results["ours"]["tasks"]["questions"]["scores"]["questions"]["acc,none"],
        )
        print(f"{'':<28} accuracy {acc[0]:.4f} and {acc[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
