#!/usr/bin/env python3
"""Redirect one layer's output for some prompts, and save the edited model for the pipeline to measure.

    python examples/lunar.py workflow/resources/zoo/medium lunar --layer 2 \\
        --forget workflow/resources/tasks/cloze.jsonl:context \\
        --toward workflow/resources/text/prose.jsonl:text \\
        --retain workflow/resources/tasks/polarity.jsonl:choices
    snakemake --cores all --configfile=lunar/lunar.yaml

As LUNAR (2502.07218) does it: the layer's output for the prompts to forget is moved by COEFFICIENT times the
difference between the means at the last token of the prompts that it is moved toward and of those to forget;
other prompts stay. Only the layer's down projection changes, here in closed form: with i what it reads and t
that move (nothing for prompts to retain), over all tokens,
    D = argmin sum |D i - t|^2 + ridge * mean |i|^2 * |D|^2.
Every second prompt of a set is kept out of the fit, and of these deviation.csv says how far outputs at the
last token are from where they should be, in lengths of t, before and after. lunar.yaml has the pipeline
measure critical sparsity before and after, with paired differences in twins.csv.

A small model has no refusals and knows no facts: `toward` is here any other kind of text, so that this shows
the mechanics and what the edit does to activations, not whether a model has forgotten. LUNAR itself takes a
chat model's refusals and judges what is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.sites.block import layer_path
from sparsity_atlas.sites.find import find_parts, observe_places

COEFFICIENT = 2.0
LONGEST = 128  # tokens of a prompt


class Layer:
    """One layer of a model: what its down projection reads, and what the layer puts out."""

    def __init__(self, folder: Path, number: int) -> None:
        checkpoint = Checkpoint(folder)
        self.model = load(checkpoint, dtype="float32", device="cpu")
        self.tokenizer = load_tokenizer(checkpoint)
        parts = find_parts(self.model)
        own = [part for part in parts if part.layer == number and part.name == "ffn"]
        if not own or own[0].readers("intermediate")[0].weight() is None:
            raise SystemExit(
                f"error: --layer: {number} has no dense FFN with a plain down projection"
            )
        self.part = own[0]
        self.block = self.model.get_submodule(layer_path(number, parts))
        self.down: Any = self.part.readers("intermediate")[0].module

    @torch.no_grad()
    def run(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What the down projection reads of every token, and the layer's output at each last token."""
        read: list[np.ndarray] = []
        last: list[np.ndarray] = []

        def put_out(_: Any, __: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            last.append(hidden[0, -1].double().numpy())

        handle = self.block.register_forward_hook(put_out)
        places = [(self.part, "intermediate")]
        with observe_places(
            self.model, places, lambda one: read.append(one.in_order().double().numpy())
        ):
            for prompt in prompts:
                ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][:, :LONGEST]
                self.model(ids, use_cache=False)
        handle.remove()
        return np.concatenate(read), np.array(last)


def change(read: np.ndarray, moves: np.ndarray, ridge: float) -> np.ndarray:
    """D [hidden, width], from inputs [tokens, width] and what their outputs are moved by [tokens, hidden]."""
    gram = read.T @ read
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    return np.linalg.solve(gram, read.T @ moves).T


def edit(layer: Layer, sets: dict[str, list[str]], ridge: float) -> pd.DataFrame:
    """Change the down projection; returns deviations of the prompts that the fit has not seen."""
    fitted = {name: layer.run(prompts[::2]) for name, prompts in sets.items()}
    move = COEFFICIENT * (fitted["toward"][1].mean(0) - fitted["forget"][1].mean(0))
    read = np.concatenate([fitted[name][0] for name in ("forget", "retain")])
    moves = np.zeros((len(read), len(move)))
    moves[: len(fitted["forget"][0])] = move
    before = {name: layer.run(sets[name][1::2])[1] for name in ("forget", "retain")}
    with torch.no_grad():
        layer.down.weight += torch.from_numpy(change(read, moves, ridge)).float()
    rows = []
    for name, states in before.items():
        target = states + move * (name == "forget")
        for when, found in (("before", states), ("after", layer.run(sets[name][1::2])[1])):
            far = np.linalg.norm(found - target, axis=1) / np.linalg.norm(move)
            error = far.std(ddof=1) / np.sqrt(len(far))
            ends = {"low": far.mean() - 1.96 * error, "high": far.mean() + 1.96 * error}
            about = {"prompts": name, "when": when, "count": len(far)}
            rows.append({**about, "deviation": far.mean(), **ends})
    return pd.DataFrame(rows)


def prompts_of(where: str, most: int) -> list[str]:
    """The first prompts of FILE.jsonl:FIELD; of a list in the field its first item."""
    file, _, field = where.rpartition(":")
    lines = Path(file).read_text(encoding="utf-8").splitlines()[:most]
    values = [json.loads(line)[field] for line in lines]
    return [value[0] if isinstance(value, list) else value for value in values]


def configuration(before: Path, after: Path, tasks: list[str]) -> dict[str, Any]:
    """What has the pipeline compare the two."""
    run = {"criteria": ["topp"], "sites": ["intermediate", "input"], "levels": "auto"}
    models = {"before": {"path": str(before)}, "after": {"path": str(after)}}
    return {
        **{"models": models, "compare": [list(models)]},
        "run": [{"models": list(models), "tasks": tasks, **run}],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--layer", type=int, required=True)
    for name in ("forget", "toward", "retain"):
        parser.add_argument(f"--{name}", required=True, help="FILE.jsonl:FIELD")
    parser.add_argument("--prompts", type=int, default=200, help="of each set")
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--tasks", nargs="+", default=["prose", "pairs"])
    arguments = parser.parse_args()
    sets = {
        name: prompts_of(getattr(arguments, name), arguments.prompts)
        for name in ("forget", "toward", "retain")
    }
    layer = Layer(arguments.model, arguments.layer)
    found = edit(layer, sets, arguments.ridge)
    after = arguments.output / "model"
    layer.model.save_pretrained(after)
    layer.tokenizer.save_pretrained(after)
    found.to_csv(arguments.output / "deviation.csv", index=False, float_format="%.4g")
    text = yaml.safe_dump(configuration(arguments.model, after, arguments.tasks))
    (arguments.output / "lunar.yaml").write_text(text, encoding="utf-8")
    sys.stdout.write(found.round(3).to_string(index=False) + "\n")
