"""What the probes find in every causal model type of the installed transformers, and the page that says it.

python tests/type_survey.py > docs/models.md
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from small_configs import small_config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models import working_sizes
from sparsity_atlas.models.causality import kind_of
from sparsity_atlas.models.parameters import count_parameters
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.terms import EXPERTS, SITES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Several seconds each: linear attention without a kernel, a vocabulary that is not made small.
SLOW = ("bailing_hybrid", "kimi_linear", "inkling2_loop_text", "inkling2_text")
# Parameters; a type that the table of sizes does not make so small is not tried.
MOST = 30_000_000
NOT_TRIED = "not tried: its default configuration is not made small by the table of the tests"
# Those that cannot be made, or do not run, by themselves.
OTHERS = {
    "gemma3n": "loaded with its part for images, which needs the package timm; its text is `gemma3n_text`",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a drafter of tokens that reads another model's states",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "sound: its decoder reads another model's states"
    ),
}
# By what an error says.
REASONS = {
    r"a state-space model": "a state-space model: no layer has an FFN",
    r"do not go through transformers' experts interface": "experts outside transformers' experts interface",
    r"seems to be a shared expert": "a shared expert that no probe proves",
    r"calls in one forward pass": "layers that run again",
    r"share their weights|are the same weights": "layers that share an FFN",
    r"several lists of layers": "several stacks of layers, of bytes and of patches",
    r"holds 0 FFNs that a probe proves and 0 modules": "layers with something else in the place of an FFN",
    r"FFNs that a probe proves": "FFNs of another form than W_d(u ⊙ g), or not in every layer",
    r"packed or transposed": "batches that are packed or transposed",
    r"each of which reads another multiple of its input": "experts that scale their input, and several a "
    "token (so by default; with one a token, as published, all are found)",
    r"its forward pass fails|gives no logits": "its forward pass fails on text alone",
    r"not causal: another token": "bidirectional, and no masked-diffusion model",
}

INTRO = """# Model types

What is found in each of the {count} causal model types of transformers {release}, in a random model of two
layers, otherwise as its default configuration has it. Made by `python tests/type_survey.py`; a test compares
it. Sites are found by structure and proved for each checkpoint anew: a type that is not in this list is
looked at like any other. How checkpoints for more than text, those in GGUF and quantised ones are loaded, and
which forms of an FFN are known: [hub.md](hub.md).

"""


def verdict(kind: str) -> str:
    """Which sites a model type has, or why none; a heading of the page."""
    try:
        config = small_config(kind)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > MOST:
            return NOT_TRIED
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        kind_of(model)
        parts = find_parts(model)
        # What its manifest says besides must be there for every type, too.
        working_sizes.describe(model)
        count_parameters(model, parts)
    except AtlasError as error:
        return f"refused: {OTHERS.get(kind) or _reason(str(error))}"
    except Exception:  # noqa: BLE001 (whatever its class makes of sizes that are not its own)
        return f"refused: {OTHERS[kind]}" if kind in OTHERS else NOT_TRIED
    sites = tuple(Available.in_parts(parts).describe()["sites"])
    experts = " of its experts, too" if any(part.name == EXPERTS for part in parts) else ""
    named = "all eight sites" if sites == SITES else f"{', '.join(sites)}"
    return f"{named}{experts}"


def read_page(text: str) -> dict[str, str]:
    """The verdicts that a page holds, by model type."""
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", text, re.MULTILINE)
    return {kind: name for name, kinds in rows for kind in re.findall(r"`([^`]+)`", kinds)}


def _reason(text: str) -> str:
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, text)), text)


def page(verdicts: dict[str, str]) -> str:
    """The page for people."""
    grouped = defaultdict(list)
    for kind, found in verdicts.items():
        grouped[found].append(f"`{kind}`")
    found = [name for name in grouped if not name.startswith(("refused", "not tried"))]
    intro = INTRO.format(count=len(verdicts), release=transformers.__version__)
    lines = [*intro.splitlines(), "| sites | model types |", "|---|---|"]
    lines += [f"| {name} | {', '.join(grouped[name])} |" for name in sorted(found)]
    rest = sorted(name for name in grouped if name not in found)
    lines += ["", "| none, because | model types |", "|---|---|"]
    lines += [f"| {name.removeprefix('refused: ')} | {', '.join(grouped[name])} |" for name in rest]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.stdout.write(page({kind: verdict(kind) for kind in TYPES}))
