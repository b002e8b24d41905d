"""The workflow's own commands on a tiny mixture of experts, one process at a time."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from checkout import Checkout
from hooks.forking import Forked
from tiny_lm import CHOICE, choice_documents, save_model, sentences, write_task


@dataclass(frozen=True)
class Job:
    """A job of the workflow.

    outputs: its declared outputs, and `command` what its shell is given.
    """

    rule: str
    outputs: tuple[str, ...]
    command: str

    def __str__(self) -> str:
        return f"{self.rule} {self.outputs[0].removeprefix('results/')}"


def configuration() -> dict[str, Any]:
    """A search, a list of levels, a capture of two blocks and all that follows."""
    block = {"models": ["tiny"], "sites": ["intermediate"], "tasks": ["choice"]}
    return {
        "replicates": 100,
        "capture": {"text": "words", "tokens": 256, "sequence_length": 16},
        "search": {"max_levels": 2, "resolution": 0.2},
        "models": {"tiny": {"path": "models/tiny", "batch_size": 4}},
        "texts": {"words": {"file": "words.jsonl"}},
        "tasks": {"choice": {"task": "choice", "include": "my_tasks"}},
        "run": [
            {**block, "criteria": ["topp"], "levels": "auto"},
            {**block, "criteria": ["topk"], "levels": [0.5], "sensitivity": [0.9, 0.5]},
        ],
    }


# A dense layer, and one with a shared expert beside routed ones: all kinds of files that a model has.
MIXTURE: dict[str, Any] = {
    **{"kind": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "num_key_value_heads": 2,
}


def make(path: Path) -> Checkout:
    """A working copy with the tiny model, its text and its task."""
    checkout = Checkout.make(path)
    save_model(checkout.path / "models/tiny", **MIXTURE)
    lines = (json.dumps({"text": text}) + "\n" for text in sentences(80))
    (checkout.path / "words.jsonl").write_text("".join(lines))
    write_task(checkout.path / "my_tasks", "choice", choice_documents(24), **CHOICE)
    # From anywhere: lm-eval finds the file beside the task's YAML.
    task = checkout.path / "my_tasks/choice.yaml"
    task.write_text(task.read_text().replace(f"{checkout.path}/my_tasks/", ""))
    return checkout


def jobs(checkout: Checkout) -> list[Job]:
    """Every job of a run, in an order in which they can be run one after the other."""
    planned = checkout.plan("--printshellcmds", "--forceall", config=configuration())
    assert planned.returncode == 0, planned.text
    found = []
    for block in re.split(r"\n(?=(?:local)?rule \w+:\n)", planned.text)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        output = re.search(r"^ {4}output: (.*)$", block, re.MULTILINE)
        command = re.search(r"^\s*(python -m sparsity_atlas (?:.*\\\n)*.*)$", block, re.MULTILINE)
        if output and command:
            found.append(Job(rule, tuple(output[1].split(", ")), command[1]))
    return _in_order(found)


def _in_order(found: list[Job]) -> list[Job]:
    """By the order of the rules, which is that of a run."""
    order = ["run_config", "model", "capture", "metrics", "dense", "evaluate", "search"]
    order += ["output_error", "sensitivity", "curve", "model_summary", "tables", "figures", "page"]
    return sorted(found, key=lambda job: order.index(job.rule))


def start(checkout: Checkout, job: Job, **environment: str) -> Forked:
    """Start a job as Snakemake does, as the head of a process group of its own."""
    for output in job.outputs:
        (checkout.path / output).parent.mkdir(parents=True, exist_ok=True)
    python, *arguments = shlex.split(job.command.split(">")[0].replace("\\\n", " "))
    assert python == "python"
    log = log_file(checkout, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    return checkout.start(*arguments, log=log, **environment)


def run(checkout: Checkout, job: Job, **environment: str) -> int:
    """Run a job; its exit code."""
    return start(checkout, job, **environment).wait(timeout=300)


def log_file(checkout: Checkout, job: Job) -> Path:
    """Where a job's shell sends what it says."""
    log = re.search(r">\s*(results/logs/\S+) 2>&1$", job.command)
    return checkout.path / log[1]


def log_of(checkout: Checkout, job: Job) -> str:
    """What a job's log says."""
    return log_file(checkout, job).read_text(errors="replace")


def error_of(checkout: Checkout, job: Job) -> str:
    """The one line in which a job ended."""
    lines = log_of(checkout, job).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in "\n".join(lines), "\n".join(lines)
    assert lines[-1:] == errors, lines
    return errors[0]


# Seconds that each forward pass takes longer: a tiny model's are over before they can be met.
SLOW = "0.03"


def run_all(path: Path) -> None:
    """Run every job once, in order."""
    checkout = make(path)
    took = []
    for job in jobs(checkout):
        began = time.monotonic()
        assert run(checkout, job, SLOW=SLOW) == 0, log_of(checkout, job)
        took.append((astuple(job), time.monotonic() - began))
    (path / "seconds.json").write_text(json.dumps(took))


def seconds(checkout: Checkout) -> dict[Job, float]:
    """The jobs of `run_all`, in order, and the seconds that each took."""
    took = json.loads((checkout.path / "seconds.json").read_text())
    return {Job(rule, tuple(outputs), command): time for (rule, outputs, command), time in took}


def job_of(checkout: Checkout, rule: str) -> Job:
    """The first job of a rule in `run_all`, of which this is a copy: it need not be planned again."""
    return next(job for job in seconds(checkout) if job.rule == rule)


def copy(checkout: Checkout, path: Path) -> Checkout:
    """The same working copy elsewhere: sources linked, results copied."""
    path.mkdir(parents=True)
    for entry in checkout.path.iterdir():
        if entry.name in ("results", ".snakemake"):
            shutil.copytree(entry, path / entry.name)
        elif entry.is_dir():
            os.symlink(entry, path / entry.name)
        elif entry.is_file():
            shutil.copy2(entry, path / entry.name)
    return Checkout(path)
