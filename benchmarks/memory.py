"""Peaks of memory of whole jobs against what a scheduler is told of them.

    python benchmarks/memory.py --folder /tmp/memory
    python benchmarks/memory.py --folder /tmp/memory --device cuda --rows 135m

Each job is the stage's own command in a process of its own, on models with random weights and a task of
long pages or of questions; its peak is the kernel's (`ru_maxrss`), on a GPU also torch's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.rules.footprint import MIB, Needs

ROOT = Path(__file__).resolve().parents[1]
PROSE = ROOT / "workflow/resources/text/prose.jsonl"
ZOO = ROOT / "workflow/resources/zoo"
# Vocabulary, layers, hidden width, FFN width, heads, key-value heads.
SHAPES = {
    "wide": (262_144, 2, 64, 128, 2, 2),
    "135m": (49_152, 30, 576, 1536, 9, 3),
    "270m": (262_144, 18, 640, 2048, 4, 1),
}
# Of other families: what a pass of them holds beside the tensors of a Llama's layer, so wide that it
# is most of what a job holds.
FAMILIES: dict[str, dict[str, Any]] = {
    "streams": {
        **{
            "model_type": "gemma3n_text",
            "vocab_size": 16_384,
            "vocab_size_per_layer_input": 16_384,
        },
        **{"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": [1024] * 6},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "laurel_rank": 64},
        **{"altup_num_inputs": 4, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 2},
        **{"activation_sparsity_pattern": [0.0] * 6, "sliding_window": 512},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "linear": {
        **{"model_type": "qwen3_next", "vocab_size": 16_384, "num_hidden_layers": 4},
        **{"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
        **{"linear_num_key_heads": 8, "linear_num_value_heads": 16},
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        **{"shared_expert_intermediate_size": 256, "intermediate_size": 1024},
    },
    # A scan token by token (Jamba) and in chunks (Bamba); latent attention; experts; scores that are kept;
    # inputs of layers and wide heads (Gemma 4).
    "scan": {
        **{"model_type": "jamba", "vocab_size": 16_384, "num_hidden_layers": 4},
        **{"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
        **{"num_key_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 3},
        **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 32},
        **{"mamba_d_state": 16, "mamba_expand": 2, "use_mamba_kernels": False},
    },
    "chunks": {
        **{"model_type": "bamba", "vocab_size": 16_384, "num_hidden_layers": 4},
        **{"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
        **{"num_key_value_heads": 2, "attn_layer_indices": [3], "mamba_n_heads": 16},
        **{"mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_expand": 2},
    },
    "latent": {
        **{"model_type": "deepseek_v3", "vocab_size": 131_072, "num_hidden_layers": 4},
        **{"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 8},
        **{"num_experts_per_tok": 2, "q_lora_rank": 128, "kv_lora_rank": 128, "n_group": 1},
        **{"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "topk_group": 1},
        "first_k_dense_replace": 1,
    },
    "experts": {
        **{"model_type": "qwen3_moe", "vocab_size": 131_072, "num_hidden_layers": 4},
        **{"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
        **{"num_experts": 8, "num_experts_per_tok": 2},
    },
    "sinks": {
        **{"model_type": "gpt_oss", "vocab_size": 131_072, "num_hidden_layers": 4},
        **{"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8},
        **{"num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 8},
        **{"num_experts_per_tok": 2, "sliding_window": 128},
    },
    "inputs": {
        **{"model_type": "gemma4_text", "vocab_size": 131_072, "hidden_size": 512},
        **{"vocab_size_per_layer_input": 131_072, "num_hidden_layers": 6},
        **{"intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"head_dim": 64, "global_head_dim": 128, "hidden_size_per_layer_input": 64},
        **{"num_kv_shared_layers": 2, "sliding_window": 512},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "ungated": {
        **{"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12},
        "n_positions": 1024,
    },
}
PAGES = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
QUESTIONS = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@dataclass(frozen=True)
class Row:
    """A model with its settings, and the jobs that are measured."""

    model: str  # of SHAPES, of FAMILIES, or of the zoo
    task: str
    batch_size: int
    max_length: int | None
    stages: tuple[str, ...]
    site: str = "intermediate"


ALL = ("models", "dense", "evaluate", "capture", "calibrate", "output_error")
ROWS = {
    "small": Row("small", "questions", 16, None, ALL),
    "large": Row("large", "pages", 16, None, ALL),
    "wide": Row("wide", "pages", 8, 512, ALL),
    "wide-questions": Row("wide", "questions", 16, None, ("dense", "evaluate")),
    "135m": Row("135m", "pages", 4, 1024, ALL),
    "135m-questions": Row("135m", "questions", 8, None, ("dense", "evaluate"), "all_inputs"),
    "270m": Row("270m", "pages", 4, 512, ("models", "dense", "evaluate", "capture")),
    "streams": Row("streams", "pages", 16, 512, ALL),
    "linear": Row("linear", "pages", 16, 512, ALL),
    "ungated": Row("ungated", "pages", 4, 512, ALL),
    "scan": Row("scan", "pages", 8, 512, ALL),
    "chunks": Row("chunks", "pages", 8, 512, ALL),
    "latent": Row("latent", "pages", 8, 512, ALL),
    "experts": Row("experts", "pages", 8, 512, ALL),
    "sinks": Row("sinks", "pages", 8, 512, ALL),
    "inputs": Row("inputs", "pages", 8, 512, ALL),
}


def llama(
    vocabulary: int, layers: int, hidden: int, width: int, heads: int, groups: int
) -> dict[str, Any]:
    """Settings of a model of `SHAPES`."""
    return {
        **{"model_type": "llama", "vocab_size": vocabulary, "num_hidden_layers": layers},
        **{"hidden_size": hidden, "intermediate_size": width, "num_attention_heads": heads},
        **{"num_key_value_heads": groups, "max_position_embeddings": 8192},
        "tie_word_embeddings": True,
    }


def model_at(folder: Path, shape: str) -> Path:
    """A model that is written if it is not there.

    By a process of its own: what this one has in memory when it starts a job counts as the job's peak.
    """
    if shape not in SHAPES | FAMILIES:
        return ZOO / shape
    path = folder / "models" / shape
    if not (path / "model.safetensors").is_file():
        writer = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(path, shape)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"{path}: could not be written")
    return path


def write_model(path: Path, shape: str) -> None:
    """A model with random weights and the zoo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = FAMILIES[shape] if shape in FAMILIES else llama(*SHAPES[shape])
    config = AutoConfig.for_model(**settings, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(ZOO / "small").save_pretrained(path)


def write_tasks(folder: Path, row: Row) -> dict[str, dict[str, Any]]:
    """Pages that fill a batch, and 24 questions of some 60 words, as entries of a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for line in PROSE.read_text("utf-8").splitlines()]
    words = " ".join(texts).split()
    length = row.max_length or 512
    pages = [{"page": " ".join(words[i * 500 :][:length])} for i in range(row.batch_size)]
    questions = [
        {
            "context": " ".join(words[i * 97 :][: 30 + 5 * (i % 12)]),
            "choices": [" ".join(words[i * 97 + 31 * j :][:6]) for j in range(4)],
            "answer": i % 4,
        }
        for i in range(24)
    ]
    for name, documents, content in (("pages", pages, PAGES), ("questions", questions, QUESTIONS)):
        lines = "".join(json.dumps(one) + "\n" for one in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        about = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | content), encoding="utf-8")
    return {name: {"include": str(folder)} for name in ("pages", "questions")}


def configuration(folder: Path, row: Row, device: str) -> Config:
    """What the row's jobs are run with."""
    entry = {"path": str(model_at(folder, row.model)), "batch_size": row.batch_size}
    if row.max_length:
        entry["max_length"] = row.max_length
    return parse(
        {
            "device": device,
            "capture": {"tokens": 8192},
            "calibration": {"tokens": 4096},
            "models": {"m": entry},
            "criteria": {"topp": None, "teal": None},
            "texts": {"prose": {"file": str(PROSE)}},
            "tasks": write_tasks(folder / f"{row.model}-tasks", row),
            "run": [
                {"models": ["m"], "criteria": ["topp", "teal"], "sites": [row.site]}
                | {"levels": [0.9], "tasks": [row.task]}
            ],
        }
    )


def command(config: Config, row: Row, stage: str, place: Path) -> list[str]:
    """A stage's command line, as its rule has it."""
    site = row.site
    model = ["--model", f"{place}/model.json"]
    settings = ["--settings", grid.evaluation_slice(config, "m", (row.task,))]
    store = f"{place}/activations.zarr"
    teal = grid.criterion_slice(config, "teal")
    topp = grid.criterion_slice(config, "topp")
    options: dict[str, list[str]] = {
        "models": ["--name", "m", "--source", grid.fetch_slice(config, "m")],
        "dense": [*model, *settings],
        "evaluate": [*model, *settings, "--criterion", topp, "--site", site, "--level", "0.9"],
        "capture": [
            *(*model, "--site", site, "--store", store),
            *("--settings", grid.capture_slice(config, "m")),
        ],
        "calibrate": [
            *(*model, "--site", site, "--store", store, "--criterion", teal),
            *("--capture", f"{place}/capture/{site}.json"),
            *("--settings", grid.store_slice(config, "m")),
        ],
        "output_error": [
            *(*model, "--site", site, "--store", store, "--criterion", topp, "--levels", "0.9"),
            *("--settings", grid.error_slice(config, "m")),
        ],
    }
    outputs = {
        **{"models": "model.json", "dense": "dense/eval.json"},
        **{"evaluate": f"topp/{site}/0.9/eval.json", "capture": f"capture/{site}.json"},
        "calibrate": f"teal/{site}/calibration.safetensors",
        "output_error": f"topp/{site}/sparsity.parquet",
    }
    name = "evaluate" if stage == "dense" else stage
    return [name, *options[stage], "--output", f"{place}/{outputs[stage]}"]


def peak(arguments: list[str], log: Path) -> tuple[int, int]:
    """Bytes that a job had at most in host memory and, by torch's account, on a GPU."""
    code = (
        "import atexit, sys\n"
        "def tell():\n"
        "    torch = sys.modules.get('torch')\n"
        "    used = torch.cuda.max_memory_reserved() if torch and torch.cuda.is_available() else 0\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    most = next(line.split()[1] for line in lines if line.startswith('VmHWM'))\n"
        "    print('peaks', most, used, file=sys.stderr)\n"
        "atexit.register(tell)\n"
        "from sparsity_atlas.__main__ import main\n"
        "main()\n"
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        job = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=file, stdout=file)
    failed = job.wait()
    text = log.read_text()
    if failed:
        raise SystemExit(f"{' '.join(arguments[:1])}: {text[-2000:]}")
    host, device = text.rsplit("peaks ", 1)[1].split()[:2]
    return int(host) * 1024, int(device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for models and results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["SPARSITY_ATLAS_BUILDERS"] = "0"  # the kernel's peak is that of one process
    for name in arguments.rows.split(","):
        row = ROWS[name]
        config = configuration(arguments.folder, row, arguments.device)
        results = arguments.folder / f"{name}-{arguments.device}"
        for stage in dict.fromkeys(("models", *row.stages)):
            began = time.monotonic()
            place = results / "m"
            # As the rule would ask, before the job.
            needs = Needs(config, str(results))
            site = row.site if stage in ("evaluate", "calibrate", "output_error") else None
            told = needs.host(stage, "m", site)
            host, device = peak(command(config, row, stage, place), place / f"logs/{stage}.log")
            if stage == "dense":  # which is known to it only, and to all jobs after it
                told = Needs(config, str(results)).host(stage, "m", site)
            line = f"{name:<15}{stage:<10}host {host // MIB:>6,} MiB, expected {told:>6,}"
            line += f" ({told * MIB / host:.2f})"
            if device:
                wanted = needs.gpu_memory(stage, "m", site)
                line += f"   GPU {device // MIB:>6,} MiB, asked {wanted:>6,}"
            print(f"{line}   {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
