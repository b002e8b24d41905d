"""Decoders with sparse maps beside transformers' own loop, of many kinds: tests/decoder_on_device.py.

CI has no GPU. Small random models in float32, by found and by constant thresholds at every site, 1, 3 and 16
rows, up to the last position that a model is made for: each token is that of a growing cache with the
criterion simulated, unless in some step before two entries lay so near at their threshold that a rounding
moves one across. Says what is refused, and how many layers are joined. Ends with 1 if a token differs
otherwise. `--device cpu` takes some ten minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from on_device import failures  # noqa: E402
from sparsity_atlas import kernels  # noqa: E402
from sparsity_atlas.criteria import create  # noqa: E402
from sparsity_atlas.criteria.binding import bind_all  # noqa: E402
from sparsity_atlas.errors import AtlasError  # noqa: E402
from sparsity_atlas.lm.continuous.able import refusal_of_model  # noqa: E402
from sparsity_atlas.lm.continuous.ring_proof import proved  # noqa: E402
from sparsity_atlas.sites.find import find_parts, random_ids  # noqa: E402
from sparsity_atlas.sparsify.attach import applied  # noqa: E402
from sparsity_atlas.speed.decoder import Decoder  # noqa: E402
from sparsity_atlas.speed.replaced import replaced  # noqa: E402
from sparsity_atlas.terms import SITES, TENSORS  # noqa: E402
from tiny_models import ARCHITECTURES, EXPERTS, tiny_model  # noqa: E402

# Tokens of the fullest rows together are what the models are made for.
POSITIONS = 64
SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"max_position_embeddings": POSITIONS, "initializer_range": 0.3},
}
BOTH = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 9,
}
# Beside the tiny ones: model type, and what is special.
LARGER: dict[str, tuple[str, dict[str, Any]]] = {
    "biases, tied": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "one group": ("llama", {"num_key_value_heads": 1}),
    "as many groups as heads": ("llama", {"num_key_value_heads": 8}),
    "odd widths": (
        "llama",
        {
            **{"hidden_size": 72, "intermediate_size": 150, "head_dim": 12},
            **{"num_attention_heads": 6, "num_key_value_heads": 3},
        },
    ),
    "relu2": ("llama", {"hidden_act": "relu2"}),
    "window": ("mistral", {"sliding_window": 9}),
    "soft caps": (
        "gemma2",
        BOTH | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "windows in some layers": ("gemma3_text", BOTH),
    "norms of heads": ("qwen3", {}),
    "norms behind": ("olmo3", BOTH),
    "parallel": ("cohere2", BOTH),
    "multipliers": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "fused": ("phi3", {"sliding_window": 9}),
    "no rotary embedding in one layer": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "no gate": ("arcee", {}),
}
RULES = (("topp", 0.6), ("topk", 0.5), ("threshold", 0.3))
# Rows, and tokens of their prompts and texts.
RUNS = ((1, 5, 12), (3, POSITIONS - 24, 23), (16, 9, 8))
# Entries nearer to each other than this, as a share, may change places by a rounding.
NEAR = 1e-5


def models() -> dict[str, Any]:
    """How each is made."""
    made = {
        name: lambda name=name: tiny_model(name, initializer_range=0.3)
        for name, (_, settings) in (ARCHITECTURES | EXPERTS).items()
        if "hidden_size" in settings
    }
    return made | {name: lambda given=given: larger(*given) for name, given in LARGER.items()}


def larger(kind: str, settings: dict[str, Any]) -> Any:
    """A model with three layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | settings))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Bench:
    """A model on a device, and what is known of it."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model.to(device), device
        self.parts = find_parts(self.model)

    def sites(self) -> list[str]:
        """Those that it has."""
        own = {tensor for part in self.parts for tensor in part.tensors}
        return [site for site in SITES if own & set(TENSORS[site])]

    def check(self, number: int) -> None:
        """One site, by one of the rules and runs each."""
        site = self.sites()[number]
        (rule, level), (rows, prompt, steps) = RULES[number % 3], RUNS[number // 3 % 3]
        try:
            told = self._told(site, rule, level, rows, prompt, steps)
        except AtlasError as error:
            told = f"refused: {error}"
        print(f"       {site}, {rule}, {rows} rows: {told}")  # noqa: T201

    def _told(self, site: str, rule: str, level: float, rows: int, prompt: int, steps: int) -> str:
        why = refusal_of_model(self.model)
        if why is not None:
            return f"refused: {why}"
        size = prompt + steps
        proof = proved(self.model, random_ids(self.model, (1, size))[0].tolist(), size)
        if proof.masks is None:
            return f"refused: with keys and values in fixed places {proof.fault}"
        bound = bind_all(create({"rule": rule}), self.parts, site)
        ids = random_ids(self.model, (rows, prompt)).to(self.device)
        decoder = Decoder(self.model, rows, size, masks=proof.masks)
        with torch.no_grad():
            first = decoder.prompt(ids)
            with replaced(self.model, self.parts, site, bound, level):
                found = decoder.go_on(steps)
        wanted, margins = self._simulated(ids, first, steps, site, bound, level)
        other = (found.cpu() != wanted.cpu()).any(1)
        if bool(other.any()):
            step = int(other.nonzero()[0])
            least = min(margins[: step + 1])
            assert least < NEAR, f"step {step} differs; entries lie apart by {least:.1e}"
            return f"step {step} differs, where two entries lie apart by {least:.1e}"
        return f"the same tokens, {decoder.joined} layers joined"

    def _simulated(
        self, ids: Tensor, first: Tensor, steps: int, site: str, bound: Any, level: float
    ) -> tuple[Tensor, list[float]]:
        """Tokens of transformers' own loop, and how near entries lay at their thresholds, by step."""
        made, margins, own = [], [], kernels.masked
        nearest: list[Tensor] = []

        def watched(rule: Any, values: Tensor, onto: Tensor) -> Any:
            found = own(rule, values, onto)
            ranked = values.abs().flatten(0, -2).sort(-1, descending=True).values
            kept = (found.out != 0).flatten(0, -2).sum(-1, keepdim=True)
            kept = kept.clamp(1, ranked.shape[-1] - 1)
            last, following = ranked.gather(-1, kept - 1), ranked.gather(-1, kept)
            apart = (last - following) / last
            if rule.constants is not None:
                apart = (values.abs() / rule.constants.to(values) - 1).abs()
            nearest.append(apart.min())
            return found

        with torch.no_grad():
            cache = self.model(input_ids=ids, use_cache=True).past_key_values
            token = first
            kernels.masked = watched
            try:
                with applied(self.model, self.parts, site, bound, level):
                    for _ in range(steps):
                        nearest.clear()
                        given = {"input_ids": token[:, None], "past_key_values": cache}
                        out = self.model(**given, use_cache=True)
                        token = out.logits[:, -1].argmax(-1)
                        made.append(token)
                        margins.append(min(map(float, nearest)))
            finally:
                kernels.masked = own
        return torch.stack(made), margins


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="models with this in their name")
    arguments = parser.parse_args()
    failed = 0
    for name, make in models().items():
        if arguments.only not in name:
            continue
        try:
            bench = Bench(make(), arguments.device)
        except AtlasError as error:
            print(f"refused {name}: {error}")  # noqa: T201
            continue
        checks = {
            f"{name}: {site}": lambda bench=bench, number=number: bench.check(number)
            for number, site in enumerate(bench.sites())
        }
        failed += failures(checks, "")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
