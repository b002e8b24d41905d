"""The stage `speed` on a GPU, without a run around it: python tests/speed_on_device.py

CI has none. A Llama of the 8B shape with two layers and random weights is made there and timed at few shares:
maps and whole tokens, by found and by fixed thresholds. Prints the rows; ends with 1 if something was refused
that should not be, or what is left unread is not what the shares say. Takes less than a minute on an H200.
`--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent)]

from sparsity_atlas.criteria import create  # noqa: E402
from sparsity_atlas.models.parameters import count_parameters  # noqa: E402
from sparsity_atlas.sites.find import describe_parts, find_parts, random_ids  # noqa: E402
from sparsity_atlas.speed import measure  # noqa: E402
from sparsity_atlas.speed.machine import machine  # noqa: E402
from sparsity_atlas.speed.speed_table import OK, TOKEN  # noqa: E402
from sparsity_atlas.terms import CAUSAL  # noqa: E402

SHARES = (0.0, 0.5, 0.9)
CURVE: dict[str, Any] = {"points": [], "critical": []}


def llama(device: str, *, tiny: bool) -> Any:
    """Random weights, two layers."""
    sizes = (64, 192, 4, 2, 500) if tiny else (4096, 14336, 32, 8, 32000)
    hidden, width, heads, groups, vocabulary = sizes
    config = LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": 2},
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary},
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def main() -> None:
    """Print the rows, and what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    measure.SHARES = SHARES
    model = llama(arguments.device, tiny=arguments.tiny)
    parts = find_parts(model)
    manifest = {
        **{"ffn": describe_parts(parts), "parameters": count_parameters(model, parts)},
        **{
            "kind": CAUSAL,
            "hidden": model.config.hidden_size,
            "memory": {"vocabulary": model.config.vocab_size},
        },
    }
    ids = random_ids(model, (8, 128)).cpu().numpy()
    settings = {"device": arguments.device, "contexts": [256], "tokens": [1, 4]}
    sys.stdout.write(f"{machine(arguments.device)}\n")
    wrong = []
    for site in ("all_linear_inputs", "gate"):
        given = manifest, model, site, create({"rule": "topp"}), None, CURVE, ids, settings
        for row in measure.rows(*given):
            if row["status"] != OK:
                wrong.append(f"{site}: {row['timed']}: {row['reason']}")
                continue
            sys.stdout.write(
                f"{site:18} {row['timed']:6} {row['tokens']:2} {row['threshold']:6} "
                f"{row['sparsity']:.3f} dropped, {row['unread_share']:.3f} unread: dense "
                f"{row['dense_us']:8.1f} ±{row['dense_spread_us']:5.1f} ({row['dense_by']}), sparse "
                f"{row['sparse_us']:8.1f} ±{row['sparse_spread_us']:5.1f} us, {row['speedup']:.2f} times\n"
            )
            if abs(row["sparsity"] - row["wanted"]) > 0.02:
                wrong.append(f"{site}: {row['wanted']} was wanted, {row['sparsity']:.3f} found")
            most = 1.0 if row["timed"] != TOKEN else row["wanted"]
            if not 0 <= row["unread_share"] <= most + 0.05:
                wrong.append(f"{site}: {row['timed']}: {row['unread_share']:.3f} unread")
    sys.stdout.write("\n".join(wrong or ["nothing is wrong"]) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
