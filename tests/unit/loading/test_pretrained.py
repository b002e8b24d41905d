"""Models with code of their own, and what is said where one cannot be loaded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load
from sparsity_atlas.sites.experts.implementation import installed
from sparsity_atlas.sites.find import find_parts
from tiny_lm import save_model

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .scale import SCALE

class Config(PretrainedConfig):
    model_type = "own"
    vocab_size, hidden_size, num_hidden_layers = 64, 16, 1

class Model(PreTrainedModel, GenerationMixin):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.emb = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.register_buffer("table", SCALE / torch.arange(1, 17).float(), persistent=False)
        self.register_buffer("rows", torch.arange(16)[None], persistent=False)
        self.post_init()
    def forward(self, input_ids, **options):
        return CausalLMOutput(logits=self.head(self.emb(input_ids) * self.table))
"""


def own_model(folder: Path, code: str = CODE, name: str = "own") -> Checkpoint:
    folder.mkdir()
    (folder / "scale.py").write_text("SCALE = 3\n")
    (folder / f"{name}.py").write_text(code)
    classes = {"AutoConfig": f"{name}.Config", "AutoModelForCausalLM": f"{name}.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    torch.manual_seed(0)
    weights = {"emb.weight": torch.randn(64, 16), "head.weight": torch.randn(64, 16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder, trust_remote_code=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_that_no_checkpoint_holds(dtype: str, tmp_path: Path) -> None:
    """transformers leaves them as the memory was, where a model's own code computes them."""
    model = load(own_model(tmp_path / "m"), dtype=dtype, device="cpu")
    assert torch.equal(model.table, 3 / torch.arange(1, 17).float())
    assert torch.equal(model.rows, torch.arange(16)[None])
    assert model.dtype == getattr(torch, dtype)
    assert model.table.dtype == torch.float32


@pytest.mark.parametrize(
    "error",
    [
        "AttributeError('nosuch')",
        "TypeError('an argument')",
        "KeyError('default')",
        "Exception('a')",
        "SystemExit(0)",
    ],
)
@pytest.mark.parametrize("place", ["        self.post_init()", "class Config"])
def test_code_that_fails(error: str, place: str, tmp_path: Path) -> None:
    indent = place[: len(place) - len(place.lstrip())]
    code = CODE.replace(place, f"{indent}raise {error}\n{place}")
    checkpoint = own_model(tmp_path / "m", code)
    kind = error.partition("(")[0]
    with pytest.raises(AtlasError, match=f"cannot load model type 'own': {kind}: ") as caught:
        load(checkpoint, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(AtlasError, match=f"without its weights: {kind}: "):
        blank(checkpoint)


def test_code_that_is_not_trusted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(own_model(tmp_path / "m").folder)
    for use in (load, blank):
        with pytest.raises(AtlasError, match="say trust_remote_code: true in the model's entry"):
            use(checkpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "nosuch"}, "cannot load model type 'nosuch': "),
        ({"hidden_size": "many"}, "'llama': .*for field 'hidden_size': .*expected int.*'many'"),
        ({"num_attention_heads": 0}, "cannot load model type 'llama': ZeroDivisionError"),
        ({"hidden_act": "nosuch"}, r"'llama': config\.json: hidden_act: unknown 'nosuch'$"),
        ({"model_type": "t5"}, "'t5': it is an encoder-decoder"),
        (
            {"dtype": "nosuch"},
            r"config\.json: dtype: found 'nosuch', expected float32, bfloat16 or",
        ),
        (
            {"dtype": ["float32"]},
            r"config\.json: dtype: expected a type as float32, found \['float",
        ),
        ({"vocab_size": 310}, r"\[300, 24\] in the file, \[310, 24\] by config\.json"),
        ({"intermediate_size": 41}, r"6 tensors have another shape \(model.*\.\.\.\)"),
    ],
)
def test_a_configuration_that_does_not_fit(change: dict, says: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(AtlasError, match=says):
        load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"eos_token_id": "</s>"}', "eos_token_id: expected the id of a token, found '</s>'"),
        (
            '{"eos_token_id": [2, null]}',
            r"eos_token_id: expected the id of a token, found \[2, None\]",
        ),
    ],
)
def test_settings_of_generation_that_are_none(content: str, says: str, tmp_path: Path) -> None:
    """transformers passes over a file that it cannot read, and would generate otherwise."""
    folder = save_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(AtlasError, match=rf"generation_config\.json: {says}"):
        load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(Path("x"))])
def test_pickles_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        AtlasError, match=r"its \*\.bin is damaged, or holds objects that are no tens"
    ):
        load(Checkpoint(folder, allow_pickle=True), device="cpu")


def test_an_index_without_metadata(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        AtlasError, match=r"index\.json: expected 'metadata', which may be {}, besi"
    ):
        load(Checkpoint(folder), device="cpu")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load(Checkpoint(folder), device="cpu")


def test_links_to_nothing(tmp_path: Path) -> None:
    """As in a copy of the Hub's cache without its blobs."""
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(
        AtlasError, match=r"model\.safetensors: a link to \.\./blobs/abc, which is n"
    ):
        Checkpoint(folder).config()


def test_a_damaged_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AtlasError, match="damaged safetensors file"):
        load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize(
    ("kind", "hidden", "width", "runs"),
    [
        ("olmoe", 24, 16, "grouped_mm"),
        ("olmoe", 24, 18, "eager"),
        ("mixtral", 28, 18, "eager"),
        ("gpt_oss", 26, 16, "eager"),
    ],
)
def test_experts_of_any_width_run(
    tmp_path: Path, kind: str, hidden: int, width: int, runs: str
) -> None:
    """Torch's grouped product, transformers' default, takes rows of whole 16 bytes only."""
    sizes = {"hidden_size": hidden, "intermediate_size": width}
    sizes |= {"head_dim": 8} if kind == "gpt_oss" else {}
    few = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    folder = save_model(tmp_path / "m", kind=kind, **sizes, **few, num_key_value_heads=2)
    model: Any = load(Checkpoint(folder), dtype="float32", device="cpu")
    assert set(model.get_experts_implementation().values()) == {runs}
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
        parts = find_parts(model)
        assert {part.name for part in parts} >= {"experts"}
        for part in parts:
            if part.name == "experts":
                assert part.size("intermediate") == 2 * width
        with installed(model):
            ours = model(ids, use_cache=False).logits
        model.set_experts_implementation("eager")
        exact = model.double()(ids, use_cache=False).logits
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
