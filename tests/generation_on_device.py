"""Generation with a recorded step on a GPU, beside transformers' own loop: tests/generation_on_device.py.

CI has none. Tasks that generate are run in float32 with each of the two by tiny models of several families,
dense and with rules at several sites: texts are the same, and counts but for entries at their thresholds.
Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ[name] = tempfile.mkdtemp(prefix="generation-")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from on_device import failures  # noqa: E402
from sparsity_atlas.evaluation.evaluate import evaluate_node  # noqa: E402
from sparsity_atlas.evaluation.node import Node  # noqa: E402
from sparsity_atlas.evaluation.samples import read_table  # noqa: E402
from sparsity_atlas.lm import model as lm_model  # noqa: E402
from sparsity_atlas.lm.continuous.generator import Generator  # noqa: E402
from sparsity_atlas.lm.continuous.prompt_passes import PromptPasses  # noqa: E402
from tiny_lm import (  # noqa: E402
    GENERATION,
    open_session,
    rolling_documents,
    tiny_tokenizer,
    write_model_manifest,
    write_task,
)
from tiny_models import tiny_model  # noqa: E402

STOPS = {"short": ["e", "\n"], "long": ["\n\n"], "pair": ["the", "r"]}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {"sliding_window": 12}),
    "gemma3": ("gemma3", BOTH),
    "phi3": ("phi3", {}),
}
NODES = {
    "dense": None,
    "topp": ("topp", "all_linear_inputs", "0.8"),
    # Of a tiny Gemma 3 many entries that the output map reads are tied but for rounding.
    "topp within": ("topp", "intermediate", "0.8"),
    "topk": ("topk", "gate", "0.5"),
    "maxp": ("maxp", "up", "0.1"),
    "wina": ("wina", "intermediate", "0.5"),
    "random": ("random", "input", "0.8"),
    "stat_topk": ("stat_topk", "intermediate", "0.5"),
}


class Bench:
    """A model with its tasks, on a device."""

    def __init__(self, name: str, device: str) -> None:
        self.folder, self.device, self.times = Path(tempfile.mkdtemp()), device, 0
        kind, settings = MODELS[name]
        model = tiny_model(kind, vocab_size=300, initializer_range=0.3, **settings)
        model.save_pretrained(self.folder / "m")
        tiny_tokenizer().save_pretrained(self.folder / "m")
        self.manifest = write_model_manifest(self.folder / "m", self.folder / "model.json")
        self.tasks = {}
        for number, (task, stops) in enumerate(STOPS.items()):
            options = GENERATION["generation_kwargs"] | {
                "until": stops,
                "max_gen_toks": 5 + 9 * number,
            }
            self.tasks[task] = write_task(
                *(self.folder / "t", task, rolling_documents(40, number)),
                **GENERATION | {"generation_kwargs": options},
            )

    def run(self, node: Node | None, devices: set[str], size: int) -> tuple[Any, Any, list[bool]]:
        """Scores, samples, and of each batch, and of each pass over prompts that came twice, whether it was
        recorded."""
        self.times += 1
        folder = self.folder / f"run-{self.times}"
        lm_model.DEVICES = devices
        recorded: list[bool] = []
        original = Generator.texts

        def spy(generator: Generator, number: int) -> Any:
            found = original(generator, number)
            recorded.append(found is not None)
            return found

        keep = PromptPasses._keep

        def kept(passes: PromptPasses, table: Any, made: Any) -> None:
            keep(passes, table, made)
            recorded.append(table.shape in passes._kept)

        Generator.texts = spy  # type: ignore[method-assign]
        PromptPasses._keep = kept  # type: ignore[method-assign]
        try:
            session = open_session(self.manifest, self.tasks, device=self.device, batch_size=size)
            result = evaluate_node(session, node, folder)
        finally:
            Generator.texts = original  # type: ignore[method-assign]
            PromptPasses._keep = keep  # type: ignore[method-assign]
        assert result["status"] == "ok", result["tasks"]
        rows = read_table(folder / "samples.parquet")[1].to_pylist()
        return {name: task["scores"] for name, task in result["tasks"].items()}, rows, recorded

    def check(self, node: tuple[str, str, str] | None) -> None:
        """Both ways, at two numbers of rows."""
        made = Node.make({"rule": node[0]}, *node[1:]) if node else None
        scores, wanted, _ = self.run(made, set(), 16)
        # In other batches an entry at its threshold may be counted otherwise by transformers' loop, too.
        apart = len(_apart(wanted, self.run(made, set(), 3)[1]))
        for size in (16, 3):
            found_scores, found, recorded = self.run(made, {self.device}, size)
            # Three tasks of 40 texts; of each some passes came again, which a GPU keeps.
            least = 3 * -(-40 // size) + (3 if self.device == "cuda" else 0)
            assert len(recorded) >= least, "no batch was generated, or no pass came twice"
            assert all(recorded), (
                "a batch was left to transformers, or a pass over prompts to the host"
            )
            other = _apart(wanted, found)
            print(f"       {len(other)} of {len(wanted)} differ at {size} rows, {apart} by batches")  # noqa: T201
            for one, another in other:
                changed = {key for key in one if one[key] != another[key]}
                # No text is another.
                assert changed <= {"prompt_zeros", "generation_zeros", "unique_zeros"}, changed
            assert len(other) <= 2 * apart + len(wanted) // 20
            assert found_scores == scores


def _apart(some: list[dict], others: list[dict]) -> list[tuple[dict, dict]]:
    return [pair for pair in zip(some, others, strict=True) if pair[0] != pair[1]]


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a part of the name of those to run")
    arguments = parser.parse_args()
    benches: dict[str, Bench] = {}

    def check(model: str, node: str) -> None:
        if model not in benches:
            benches[model] = Bench(model, arguments.device)
        benches[model].check(NODES[node])

    checks = {
        f"{model} {node}": lambda model=model, node=node: check(model, node)
        for model in MODELS
        for node in (
            NODES if model == "llama" else ("dense", "topp within" if model == "gemma3" else "topp")
        )
    }
    sys.exit(failures(checks, arguments.only) > 0)


if __name__ == "__main__":
    main()
