"""Models in GGUF files: the numbers that are in them, by themselves, and refused where some would be lost."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparsity_atlas.config.grid import fetch_slice
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load, load_tokenizer
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.models import manifest as models
from sparsity_atlas.rules.inputs import locate, model_content
from sparsity_atlas.terms import SITES
from tiny_lm import CHAT, save_model, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="an extra of the package")

HEADS, WIDTH = 2, 64
SIZES = {"hidden_size": 32, "intermediate_size": WIDTH}
TEXT = "the old cat sees a bird"
IDS = torch.arange(3, 27).reshape(2, 12)
# As llama.cpp names what lies in a layer.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def own_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def rotated(weight: np.ndarray) -> np.ndarray:
    """In the order of rows that llama.cpp's rotary embedding wants of queries and keys."""
    halves = weight.reshape(HEADS, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    quantised: bool = True,
    more: dict[str, np.ndarray] | None = None,
    fields: tuple[tuple[str, Any], ...] = (),
) -> Path:
    """A Llama in a file, its matrices in Q8_0, with the tokenizer of the tests."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(7 if quantised else 0)
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if one in ("<pad>", "<s>", "</s>") else 1 for one in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    for key, value in fields:
        writer.add_uint16(key, value)
    for name, value in model.state_dict().items():
        matrix = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            matrix = rotated(matrix)
        if quantised and matrix.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own_name(name), gguf.quantize(matrix, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own_name(name), matrix)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        save_model(tmp_path_factory.mktemp("m"), **SIZES)
    ).eval()


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", model)


def checkpoint_of(path: Path, **more: Any) -> Checkpoint:
    return Checkpoint(path.parent, gguf=path.name, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_it_is_the_model_that_was_written(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", model, quantised=False)
    assert torch.equal(logits(load(checkpoint_of(path), device="cpu")), logits(model))


def test_it_is_dequantised(model: Any, file: Path) -> None:
    found = load(checkpoint_of(file), device="cpu")
    assert found.dtype == torch.float32
    assert checkpoint_of(file).dtype() == "float32"
    weight = found.model.layers[1].mlp.up_proj.weight
    assert type(found.model.layers[1].mlp.up_proj) is torch.nn.Linear
    # Blocks of 32 with one scale each, in float16: half of a step, of which there are 127.
    written = model.model.layers[1].mlp.up_proj.weight
    most = written.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 254
    away = (weight - written).unflatten(1, (-1, 32)).abs()
    assert bool((away <= 1.13 * most).all())
    assert 0 < (logits(found) - logits(model)).abs().mean() < 0.05 * logits(model).abs().mean()
    with torch.device("meta"):
        assert blank(checkpoint_of(file)).num_parameters() == model.num_parameters()


def test_one_process_reads_the_fields_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "once.gguf", model)
    read, named = mock.Mock(), mock.Mock()

    class Counted(gguf.GGUFReader):
        def __init__(self, *args: Any) -> None:
            read(*args)
            super().__init__(*args)

    def names(*args: Any) -> Any:
        named(*args)
        return made(*args)

    made = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", names)
    load_tokenizer(checkpoint_of(path))
    assert gguf.GGUFReader is Counted
    load(checkpoint_of(path), device="cpu")
    assert (read.call_count, named.call_count) == (1, 1)


def test_the_tokenizer_is_its_own_whatever_lies_beside(file: Path, tmp_path: Path) -> None:
    (tmp_path / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    checkpoint = checkpoint_of(tmp_path / file.name)
    tokenizer, wanted = load_tokenizer(checkpoint), tiny_tokenizer()
    assert tokenizer(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    assert tokenizer.chat_template == CHAT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<s>", "</s>", 0)
    assert checkpoint.digest() == checkpoint_of(file).digest()
    assert load_tokenizer(checkpoint, add_bos_token=True)(TEXT)["input_ids"][0] == 1


def test_what_the_manifest_says(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.json"
    words = ["--name", "m", "--source", json.dumps({"gguf": str(file)}), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["models", *words])
    models.main()
    found = read_manifest(output)
    assert found["gguf"] == {
        **{"file": file.name, "architecture": "llama", "quantisation": "Q8_0"},
        "types": {"F32": 5, "Q8_0": 16},
    }
    assert (found["model_type"], found["architecture"]) == ("llama", "LlamaForCausalLM")
    assert tuple(found["sites"]) == SITES
    _, checkpoint = models.from_manifest(output)
    assert checkpoint == checkpoint_of(file)


def test_rotary_frequencies_that_lie_in_the_file(model: Any, tmp_path: Path) -> None:
    """As of Llama 3.1: another model without them."""
    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], dtype=np.float32)
    path = write_gguf(
        tmp_path / "a.gguf", model, quantised=False, more={"rope_freqs.weight": factors}
    )
    found = load(checkpoint_of(path), device="cpu")
    scaled = AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    scaled.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    assert torch.equal(logits(found), logits(scaled))
    assert not torch.allclose(logits(found), logits(model))
    odd = {"rope_freqs.weight": np.ones(3, dtype=np.float32)}
    path = write_gguf(tmp_path / "b.gguf", model, more=odd)
    with pytest.raises(AtlasError, match=r"rope_freqs\.weight: factors .* has no place"):
        load(checkpoint_of(path), device="cpu")


def test_a_tensor_that_would_be_lost(model: Any, tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    path = write_gguf(tmp_path / "a.gguf", model, more=bias)
    with pytest.raises(AtlasError, match=r"hold [\d,]+ numbers, .*it would be another model"):
        load(checkpoint_of(path), device="cpu")


def test_shapes_that_its_fields_do_not_say(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No config.json is named: there is none."""
    monkeypatch.setattr(model.config, "intermediate_size", 2 * WIDTH)
    path = write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(
        AtlasError, match=r"that transformers makes of it describes: .*shape"
    ) as caught:
        load(Checkpoint(tmp_path, gguf=path.name), device="cpu")
    assert "config.json" not in str(caught.value)


def test_what_is_no_whole_file(model: Any, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(AtlasError, match=r"a\.gguf: no such file"):
        checkpoint_of(path).config()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(AtlasError, match="git-lfs pointer"):
        checkpoint_of(path).config()
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(AtlasError, match="expected a GGUF file, found another format"):
        checkpoint_of(path).config()
    path.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(AtlasError, match="damaged") as caught:
        load(checkpoint_of(path), device="cpu")
    assert "\n" not in str(caught.value)
    split = write_gguf(tmp_path / "b.gguf", model, fields=(("split.count", 3),))
    with pytest.raises(AtlasError, match=r"one of 3 files; merge them"):
        load(checkpoint_of(split), device="cpu")


def test_the_package_is_named_where_it_is_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "gguf" else find(name, *more),
    )
    for use in (load, load_tokenizer):
        with pytest.raises(
            AtlasError, match=r"GGUF is read by the package gguf: pip install gguf$"
        ):
            use(checkpoint_of(file))


def test_where_it_may_lie(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for entry in ({"gguf": str(file)}, {"path": str(file.parent), "gguf": file.name}):
        data = {
            "models": {"mine": entry},
            "criteria": {"topp": None},
            "texts": {"prose": {"file": "prose.jsonl"}},
            "tasks": {"pairs": {}},
            "run": [{"models": ["mine"]}],
        }
        config = parse(locate(data, tmp_path))
        source = json.loads(fetch_slice(config, "mine"))
        # Tables and the plan read where a model comes from.
        assert source == {"path": str(file.parent), "gguf": file.name}
        checkpoint, commit = resolve(source)
        assert (checkpoint, commit) == (checkpoint_of(file), None)
        assert model_content(config, "mine") == checkpoint.digest()
