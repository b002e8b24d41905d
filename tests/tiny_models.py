"""Random models of a few thousand parameters: many architectures, and layouts that no library has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, HIDDEN, WIDTH, VOCABULARY = 2, 16, 40, 64

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 1, "head_dim": 8}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_inner": WIDTH,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    **{key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
    **{key: COMMON[key] for key in ("num_attention_heads", "max_position_embeddings")},
    **{"ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN, "pad_token_id": 0},
}
FALCON = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {
    "ffn_hidden_size": WIDTH
}

# name: model type, settings. The name tells what is special where a type is there twice.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama-relu": ("llama", GROUPED | {"hidden_act": "relu"}),
    "llama-bias": ("llama", GROUPED | {"mlp_bias": True, "attention_bias": True}),
    "llama-square": ("llama", COMMON | {"intermediate_size": HIDDEN}),
    "llama-half": ("llama", COMMON | {"intermediate_size": HIDDEN // 2}),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "gemma": ("gemma", GROUPED),
    "gemma2": ("gemma2", GROUPED),
    "gemma3": ("gemma3_text", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "granite": ("granite", GROUPED),
    "cohere": ("cohere", GROUPED),
    "stablelm": ("stablelm", GROUPED),
    "stablelm-parallel": ("stablelm", GROUPED | {"use_parallel_residual": True}),
    "smollm3": ("smollm3", GROUPED),
    "phi3": ("phi3", GROUPED),
    "phi3-half": ("phi3", COMMON | {"intermediate_size": HIDDEN // 2}),
    "glm": ("glm", GROUPED),
    "glm4": ("glm4", GROUPED),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("recurrent_gemma", GROUPED | {"num_hidden_layers": 3}),
    "qwen3_moe-dense": ("qwen3_moe", GROUPED | {"mlp_only_layers": [0, 1]}),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "openai-gpt": ("openai-gpt", GPT),
    "opt": ("opt", OPT),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", COMMON),
    "gpt_neox-serial": ("gpt_neox", COMMON | {"use_parallel_residual": False}),
    "falcon": ("falcon", FALCON),
    "falcon-new": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon-serial": ("falcon", FALCON | {"parallel_attn": False}),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 2},
    ),
    "mpt": (
        "mpt",
        {
            **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 2},
            **{"max_seq_len": 64, "expansion_ratio": 2},
        },
    ),
    "phi": ("phi", COMMON),
    "persimmon": ("persimmon", COMMON),
    "nemotron": ("nemotron", GROUPED),
    "starcoder2": ("starcoder2", GROUPED),
    "apertus": ("apertus", GROUPED),
    "bert-decoder": ("bert", COMMON | {"is_decoder": True}),
    "ctrl": (
        "ctrl",
        {
            **{"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2},
            **{"dff": WIDTH, "n_positions": 64},
        },
    ),
    "rwkv": ("rwkv", {**COMMON, "attention_hidden_size": HIDDEN}),
}

EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        GROUPED | {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": ("gpt_oss", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": ("jetmoe", {**COMMON, "kv_channels": 8, "num_local_experts": 4}),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A random model of `ARCHITECTURES` or `EXPERTS`, the same at each call, in evaluation mode."""
    model_type, known = (ARCHITECTURES | EXPERTS)[name]
    config = AutoConfig.for_model(model_type, **(known | settings))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def token_ids(batch: int = 2, tokens: int = 6, seed: int = 1) -> Tensor:
    """Random ids [batch, tokens], without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


class Map(nn.Module):
    """A linear map that is no nn.Linear: transposed weight under another name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)

    def forward(self, value: Tensor) -> Tensor:
        return value @ self.kernel


class Mixer(nn.Module):
    """Stands for attention: each token becomes the mean of all up to it, through two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.jx = nn.Linear(HIDDEN, HIDDEN)
        self.ky = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.ky(self.jx(x).cumsum(1) / count)


SHARED = nn.SiLU()
# Keeps more than half of a row.
CUT = -0.5


class Layouts(nn.Module):
    """FFN modules with names that say nothing; `layout` is what forward does with them."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        fused = layout.startswith(("gate_up", "up_gate", "interleaved"))
        if layout == "parameters":
            self.zig = nn.Parameter(torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5)
            self.zag = nn.Parameter(torch.randn(HIDDEN, WIDTH) / WIDTH**0.5)
            return
        if layout == "maps":
            self.w8 = Map(HIDDEN, WIDTH)
            self.w3 = Map(HIDDEN, WIDTH)
            self.w5 = Map(WIDTH, HIDDEN)
            return
        self.qov = nn.Linear(HIDDEN, 2 * WIDTH if fused else WIDTH)
        if not fused and not layout.startswith("ungated"):
            self.mub = nn.Linear(HIDDEN, WIDTH)
        if layout in ("normed", "ungated-norm"):
            self.nor = nn.LayerNorm(WIDTH)
        if layout == "ungated-dropout":
            self.dro = nn.Dropout(0.5)
        self.arx = nn.Linear(WIDTH, HIDDEN)
        # In a list, so that it belongs to no layer: all of them share it.
        self.act = [SHARED]

    def forward(self, x: Tensor) -> Tensor:
        match self.layout:
            case "parameters":
                return F.linear(F.silu(F.linear(x, self.zig)), self.zag)
            case "maps":
                return self.w5(value=self.w8(value=x) * F.gelu(self.w3(value=x)))
            case "gate_up":
                first, second = self.qov(x).chunk(2, dim=-1)
                return self.arx(F.silu(first) * second)
            case "up_gate":
                first, second = self.qov(x).chunk(2, dim=-1)
                return self.arx(first * F.gelu(second, approximate="tanh"))
            case "interleaved":
                fused = self.qov(x)
                return self.arx(F.silu(fused[..., ::2]) * fused[..., 1::2])
            case "ungated":
                return self.arx(F.relu(self.qov(x)).square())
            case "ungated-linear":
                return self.arx(self.qov(x))
            case "ungated-dropout":
                return self.arx(self.dro(self.qov(x)))
            case "ungated-norm":
                return self.arx(self.nor(self.qov(x)))
            case "gated-shared":
                return self.arx(self.act[0](self.mub(x)) * self.qov(x))
            case "gated":
                return self.arx(self.qov(x) * torch.sigmoid(self.mub(x)))
            case "gated-in-place":
                gate = F.silu(self.mub(x), inplace=True)
                return self.arx(self.qov(x).mul_(gate))
            case "flattened":
                rows = x.reshape(-1, HIDDEN)
                return self.arx(F.silu(self.mub(rows)) * self.qov(x).flatten(0, 1)).view_as(x)
            case "bilinear":
                return self.arx(self.qov(x) * self.mub(x))
            case "clamped":
                return self.arx(self.qov(x).clamp(-7, 7) * F.silu(self.mub(x)))
            case "clamped-shifted":  # as in gpt-oss and MiniMax-M3
                u, z = self.qov(x).clamp(-7, 7), self.mub(x).clamp(max=7)
                return self.arx((u + 1) * (z * torch.sigmoid(1.702 * z)))
            case "clamped-shared":  # as in DeepSeek-V4
                u, g = self.qov(x).clamp(-10, 10), self.act[0](self.mub(x).clamp(max=10))
                return self.arx(u * g)
            case "clamped-after":  # as in Step 3.7
                u, g = self.qov(x).clamp(-7, 7), F.silu(self.mub(x)).clamp(max=7)
                return self.arx(u * g)
            case "cut":  # as in Gemma 3n
                return self.arx(self.act[0](top_tail(self.mub(x), CUT)) * self.qov(x))
            case "rectified":  # dReLU, as in TurboSparse
                return self.arx(F.relu(self.qov(x)) * F.relu(self.mub(x)))
            case "scaled":
                return self.arx(self.qov(x) * F.silu(self.mub(x)) * 1.1)
            case "normed":
                return self.arx(self.nor(self.qov(x) * F.silu(self.mub(x))))
            case "other-input":
                return self.arx(self.qov(x) * F.silu(self.mub(x + 1)))
        raise ValueError(self.layout)


def top_tail(z: Tensor, k: float) -> Tensor:
    """What of each row lies k standard deviations above its mean, less that."""
    return (z - (z.mean(-1, keepdim=True) + k * z.std(-1, keepdim=True, unbiased=False))).relu()


class Strange(nn.Module):
    """A decoder block by block with one of `Layouts`, under names that say nothing."""

    def __init__(self, layout: str, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(VOCABULARY, HIDDEN)
        self.yy = nn.ModuleList(
            nn.ModuleDict({"k1": nn.LayerNorm(HIDDEN), "k2": Mixer(), "k3": Layouts(layout)})
            for _ in range(layers)
        )
        self.fin = nn.Linear(HIDDEN, VOCABULARY)
        self.act = SHARED
        self.calls = 1
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.yy:
            x = x + block["k2"](block["k1"](x))
            for _ in range(self.calls):
                x = x + block["k3"](block["k1"](x))
        return self.fin(x)
