"""Tiny random mixtures of experts of every family that transformers has, and a plain loop for each."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_lm import tiny_tokenizer

EXPERTS, EACH, HIDDEN, WIDTH, VOCABULARY = 4, 2, 32, 24, 96

# What a tiny model has of any field that a family's configuration knows.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "attention_hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "mlp_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts",), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), EACH),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_num_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "conv_kernel", "time_step_rank"), 4),
    **dict.fromkeys(("linear_num_heads", "swa_num_attention_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "state_size", "mamba_d_state", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim",), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "mamba_d_head"), 16),
    **dict.fromkeys(("index_n_heads", "mamba_expand"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "unpadded_vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Families whose defaults leave out what makes them mixtures.
GIVEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": EACH},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": EACH, "n_shared_experts": 1},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        **{"hidden_size": HIDDEN, "intermediate_size": 48, "moe_intermediate_size": WIDTH},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"head_dim": 8, "global_head_dim": 8, "layer_types": ["full_attention"] * 2},
        **{"num_experts": EXPERTS, "top_k_experts": EACH, "enable_moe_block": True},
        **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY},
        **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "lfm2_moe": {
        **{"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        **{"num_dense_layers": 1},
    },
}


DECORATED = re.compile(r"^@use_experts_implementation\b.*\n(?:[@ )].*\n)*class (\w+)", re.MULTILINE)


def decorated() -> dict[str, list[str]]:
    """The classes of experts that go through the experts interface, by transformers' folder of models."""
    found: dict[str, list[str]] = {}
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        # Read as text: to parse these files takes every worker of the tests more than a second.
        names = found[path.parent.name] = DECORATED.findall(source)
        assert len(names) == source.count("\n@use_experts_implementation")
    return found


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with all that makes a model large cut down, in its parts as well."""
    for key, value in SMALL.items():
        if key in vars(config) or key in type(config).attribute_map:
            now = getattr(config, key, None)
            if now is not None or key == "head_dim":
                setattr(config, key, [value] * 2 if isinstance(now, list | tuple) else value)
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list) and len(kinds) > 2:
            several = list(dict.fromkeys(kinds))
            count = max(2, len(several))
            setattr(config, key, (several * 2)[:count])
            config.num_hidden_layers = count
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            shrink(part)
    return config


def tiny_mixture(family: str, **changes: Any) -> nn.Module:
    """A random model of a family's model type, in evaluation mode: a language model where there is one.

    Args:
        family: of transformers.
        changes: fields of its configuration.
    """
    config = shrink(AutoConfig.for_model(family, **GIVEN.get(family, {})))
    for key, value in changes.items():
        setattr(config, key, value)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def save_mixture(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny mixture that reads `tiny_tokenizer` into a folder."""
    tokenizer = tiny_tokenizer()
    model: Any = tiny_mixture(family, vocab_size=len(tokenizer), **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Of each family as wide as it takes for a row's last bits to follow how many rows its expert has.
_WIDE: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "intermediate_size": 64},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 128},
    "qwen2_moe": {
        **{"num_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 128},
        "shared_expert_intermediate_size": 128,
    },
    "deepseek_v3": {
        **{"n_routed_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 128},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        "v_head_dim": 8,
    },
}
WIDE = tuple(_WIDE)


def wide_mixture(
    family: str, hidden: int = 128, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A random model of one of `WIDE`, of which each token meets two experts of eight."""
    config = AutoConfig.for_model(
        family,
        **{
            **{"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": EACH},
            **{"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1},
            "eos_token_id": 2,
            **_WIDE[family],
            **settings,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


class _Settings(SimpleNamespace):
    """What any class of experts asks of its configuration."""

    def __getattr__(self, name: str) -> Any:
        if "limit" in name or "cap" in name or "threshold" in name:
            return 7.0
        if "eps" in name:
            return 1e-6
        if "alpha" in name:
            return 1.702
        if "bias" in name or "latent" in name:
            return None
        raise AttributeError(name)


class Alone(nn.Module):
    """One experts module, with what a model has to set what it runs."""

    def __init__(self, family: str, name: str) -> None:
        super().__init__()
        folder = f"transformers.models.{family}.modeling_"
        module = importlib.import_module(folder + family)
        self.config = _Settings(
            **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
            **dict.fromkeys(("moe_num_experts",), EXPERTS),
            **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
            **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
            **dict.fromkeys(("expert_intermediate_size",), WIDTH),
            **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
            **{"mlp_hidden_act": "relu2", "swiglu_beta": 1.0, "rms_norm_eps": 1e-6},
            **{"num_experts_per_tok": EACH, "_experts_implementation": "eager"},
        )
        torch.manual_seed(0)
        self.experts = getattr(module, name)(self.config)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        self.eval()

    def get_experts_implementation(self) -> dict[str, str]:
        return {"": self.config._experts_implementation}

    def set_experts_implementation(self, chosen: str | dict[str, str]) -> None:
        name = chosen if isinstance(chosen, str) else chosen[""]
        self.config._experts_implementation = name

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def routing(
    tokens: int, experts: int = EXPERTS, each: int = EACH, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random x [N, d], ids [N, K] without repetition in a row, and weights [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :each]
    return x, index, torch.rand(tokens, each, generator=generator) + 0.1


def first_projection(experts: Any, expert: int, x: Tensor) -> Tensor:
    """z [..., 2w or w] of x [..., d] in float64, of one expert."""
    return _map(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, x)


def second_projection(experts: Any, expert: int, i: Tensor) -> Tensor:
    """What one expert makes of its u ⊙ g, in float64."""
    y = _map(experts, "down_proj", expert, i)
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y


def product(experts: Any, z: Tensor) -> Tensor:
    """u ⊙ g of z: by the class's own function."""
    return experts._apply_gate(z) if experts.has_gate else experts.act_fn(z)


def _map(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert].double()
    made = x.double() @ (weight if experts.is_transposed else weight.T)
    return made + getattr(experts, f"{name}_bias")[expert].double() if experts.has_bias else made


def by_hand(experts: Any, x: Tensor, index: Tensor, weights: Tensor, change: Any = None) -> Tensor:
    """y [N, d] in float64, one token and one expert at a time.

    Args:
        experts: the module.
        x: [N, d].
        index: [N, K].
        weights: [N, K].
        change: (z, i, expert) to i, what becomes of each u ⊙ g.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, ids in enumerate(index.tolist()):
        for place, expert in enumerate(ids):
            z = first_projection(experts, expert, x[token])
            i = product(experts, z)
            i = i if change is None else change(z, i, expert)
            out[token] += second_projection(experts, expert, i) * weights[token, place].double()
    return out.detach()
