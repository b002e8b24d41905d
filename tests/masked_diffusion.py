"""Tiny masked-diffusion models, as transformers has them and in the layouts that they are published in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_lm import save_model, tiny_tokenizer

MASK, VOCABULARY = 303, 304
# What runs if somebody runs the code of a published folder.
TRAP = "raise SystemExit('the code of the repository was run')\n"
LLADA_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
LLADA_LAYER = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"},
    **{f"self_attn.{one}_proj": f"{one}_proj" for one in "qkv"},
    **{"self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj"},
    **{"mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"},
}


def save_diffusion(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """Write a random decoder in which each token sees all others, and whose last token is the mask."""
    own = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "mask_token_id": MASK}
    return save_model(folder, kind=kind, **{"is_causal": False, **own, **settings})


def llada_folder(folder: Path, native: Path) -> Path:
    """The weights of a Llama as LLaDA is published: its names, its settings, its own code."""
    config = json.loads((native / "config.json").read_text())
    weights = load_file(native / "model.safetensors")
    folder.mkdir()
    renamed = {_llada_name(name): value.contiguous() for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    own = {
        **{"model_type": "llada", "architectures": ["LLaDAModelLM"], "torch_dtype": "float32"},
        **{"d_model": config["hidden_size"], "mlp_hidden_size": config["intermediate_size"]},
        **{"n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"]},
        **{"n_kv_heads": config["num_key_value_heads"], "mlp_ratio": 4},
        **{"vocab_size": config["vocab_size"], "embedding_size": config["vocab_size"]},
        **{"max_sequence_length": config["max_position_embeddings"]},
        **{"rms_norm_eps": config["rms_norm_eps"], "layer_norm_type": "rms"},
        **{"rope": True, "rope_theta": config["rope_parameters"]["rope_theta"]},
        **{"rope_full_precision": True, "alibi": False, "attention_layer_norm": False},
        **{"block_type": "llama", "block_group_size": 1, "activation_type": "silu"},
        **{"include_bias": False, "include_qkv_bias": False, "scale_logits": False},
        **{"multi_query_attention": None, "input_emb_norm": False, "clip_qkv": None},
        **{"weight_tying": config["tie_word_embeddings"], "mask_token_id": MASK},
        **{"eos_token_id": 2, "pad_token_id": 0},
    }
    _own_code(folder, own, "llada", "LLaDAModelLM")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _llada_name(name: str) -> str:
    if name in LLADA_NAMES:
        return LLADA_NAMES[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
    assert found, name
    return f"model.transformer.blocks.{found[1]}.{LLADA_LAYER[found[2]]}.weight"


def dream_folder(folder: Path, native: Path) -> Path:
    """The weights of a Qwen2 as Dream is published: with code of its own, and no tokenizer.json."""
    config = json.loads((native / "config.json").read_text())
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((native / "model.safetensors").read_bytes())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["is_causal"], config["layer_types"]
    own = {
        **config,
        **{"model_type": "Dream", "architectures": ["DreamModel"], "torch_dtype": "float32"},
        **{"rope_theta": theta, "rope_scaling": None, "use_mrope": False},
        **{"use_sliding_window": False, "sliding_window": None},
    }
    _own_code(folder, own, "dream", "DreamModel")
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    (folder / "vocab.json").write_text(json.dumps(backend["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {"content": "", "lstrip": False, "normalized": False, "rstrip": False}
    special |= {"single_word": False, "special": True}
    tokens = ("<pad>", "<s>", "</s>")
    content = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(i): {**special, "content": t} for i, t in enumerate(tokens)},
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "tokenization_dream.py").write_text(TRAP)
    return folder


def _own_code(folder: Path, config: dict[str, Any], name: str, model: str) -> None:
    code = {
        "AutoConfig": f"configuration_{name}.Config",
        **dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"modeling_{name}.{model}"),
    }
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    for kind in ("configuration", "modeling"):
        (folder / f"{kind}_{name}.py").write_text(TRAP)


def logits_by_hand(folder: Path, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Logits [batch, tokens, vocabulary] of a Llama, Qwen2 or Qwen3 in which all tokens see each other.

    Positions count the valid tokens of a row; padding is seen by none.
    """
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    place = (valid.cumsum(1) - 1).clamp_min(0)
    rates = config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    angles = (place[:, :, None] * rates).repeat(1, 1, 2)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        given = norm(x, f"{at}.input_layernorm")
        q, k, v = (split(linear(given, f"{at}.self_attn.{one}_proj")) for one in "qkv")
        if f"{at}.self_attn.q_norm.weight" in w:
            q, k = (norm(one, f"{at}.self_attn.{n}_norm") for one, n in ((q, "q"), (k, "k")))
        q, k = turned(q), turned(k)
        k, v = (one.repeat_interleave(heads // one.shape[1], 1) for one in (k, v))
        scores = (q @ k.transpose(2, 3) / width**0.5).masked_fill(
            ~valid[:, None, None], float("-inf")
        )
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{at}.self_attn.o_proj")
        given = norm(x, f"{at}.post_attention_layernorm")
        gate = F.silu(linear(given, f"{at}.mlp.gate_proj"))
        x = x + linear(gate * linear(given, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return F.linear(norm(x, "model.norm"), head)
