"""Published layouts load as classes of transformers, to the same weights, and without their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from masked_diffusion import MASK, TRAP, dream_folder, llada_folder, logits_by_hand, save_diffusion
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.layouts import LAYOUTS, layout_in
from sparsity_atlas.loading.pretrained import blank, load, load_tokenizer
from sparsity_atlas.loading.source import resolve
from sparsity_atlas.models.manifest import describe, from_manifest, main
from tiny_lm import TEXT, save_model, tiny_tokenizer
from tiny_models import token_ids

MADE = {"llada": (llada_folder, "llama"), "Dream": (dream_folder, "qwen2")}


@pytest.fixture(params=MADE)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A folder in a published layout, and the same model as transformers saves it."""
    make, kind = MADE[request.param]
    native = save_diffusion(tmp_path / "native", kind)
    return make(tmp_path / "published", native), native


def test_the_same_weights(published: tuple[Path, Path]) -> None:
    found, native = (load(Checkpoint(folder), device="cpu") for folder in published)
    assert type(found) is type(native)
    own, wanted = found.state_dict(), native.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    ids = token_ids(2, 9)
    assert torch.equal(found(ids).logits, native(ids).logits)
    assert found.config.is_causal is False
    assert found.config.mask_token_id == MASK


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [1, 2])
def test_logits_of_a_bidirectional_decoder(kind: str, heads: int, tmp_path: Path) -> None:
    settings = {"num_key_value_heads": heads, "head_dim": 12}
    folder = save_diffusion(tmp_path / "m", kind, **settings)
    model = load(Checkpoint(folder), device="cpu")
    ids = token_ids(3, 9)
    valid = torch.arange(9) >= torch.tensor([[0], [2], [5]])
    with torch.no_grad():
        whole, padded = model(ids).logits, model(ids, attention_mask=valid.long()).logits
    torch.testing.assert_close(whole, logits_by_hand(folder, ids), rtol=1e-4, atol=1e-4)
    by_hand = logits_by_hand(folder, ids, valid)
    torch.testing.assert_close(padded[valid], by_hand[valid], rtol=1e-4, atol=1e-4)
    # What is padded has no part in it: the same as the row alone.
    alone = logits_by_hand(folder, ids[2:, 5:])
    torch.testing.assert_close(padded[2:, 5:], alone, rtol=1e-4, atol=1e-4)


def test_its_code_is_neither_run_nor_needed(published: tuple[Path, Path]) -> None:
    folder = published[0]
    plain = Checkpoint(folder)
    trusted = Checkpoint(folder, trust_remote_code=True)
    assert not trusted.trust_remote_code
    assert trusted.digest() == plain.digest()
    assert not trusted.code_files() or trusted.code_files() == plain.code_files()
    resolved, _ = resolve({"path": str(folder), "trust_remote_code": True})
    with torch.device("meta"):
        empty = blank(resolved)
    assert empty.num_parameters() == load(resolved, device="cpu").num_parameters()
    ids = load_tokenizer(resolved)(TEXT)["input_ids"]
    assert ids == tiny_tokenizer()(TEXT)["input_ids"]


def test_the_digest_is_of_all_that_is_read(published: tuple[Path, Path]) -> None:
    folder = published[0]
    before = Checkpoint(folder).digest()
    for path in folder.glob("*.py"):
        path.write_text(TRAP + "# edited\n")
    assert Checkpoint(folder).digest() == before
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(
        {**weights, name: weights[name] * 2},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert Checkpoint(folder).digest() != before


@pytest.mark.parametrize("layout", MADE)
def test_what_the_manifest_says(layout: str, tmp_path: Path) -> None:
    make, kind = MADE[layout]
    native = save_diffusion(tmp_path / "native", kind)
    folder = make(tmp_path / "published", native)
    found = describe(Checkpoint(folder), None)
    wanted = describe(Checkpoint(native), None)
    assert found["kind"] == wanted["kind"] == "diffusion"
    assert found["mask_token_id"] == wanted["mask_token_id"] == MASK
    assert found["shifted_logits"] is (layout == "Dream")
    assert found["model_type"] == layout
    for key in ("architecture", "parameters", "memory", "sites", "ffn", "hidden", "width"):
        assert found[key] == wanted[key], key
    assert len(found["sites"]) == 8


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        ("llada", {"alibi": True}, "alibi: found true, expected false"),
        ("llada", {"block_type": "sequential"}, 'block_type: found "sequential", expected "llama"'),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias: found true, expected false"),
        ("llada", {"d_model": None}, "d_model: missing"),
        ("llada", {"d_model": "many"}, "expected int"),
        ("Dream", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: found .*expected null"),
        ("Dream", {"use_sliding_window": True}, "use_sliding_window: found true, expected false"),
        ("Dream", {"rope_theta": None}, "rope_theta: missing"),
    ],
)
def test_settings_of_another_arithmetic(
    layout: str, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make, kind = MADE[layout]
    folder = make(tmp_path / "published", save_diffusion(tmp_path / "native", kind))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    for use in (lambda one: load(one, device="cpu"), blank, load_tokenizer):
        with pytest.raises(AtlasError, match=says) as caught:
            use(Checkpoint(folder))
        assert "\n" not in str(caught.value)


def test_a_tensor_too_many_and_one_of_whole_numbers(tmp_path: Path) -> None:
    folder = llada_folder(tmp_path / "published", save_diffusion(tmp_path / "native"))
    path = folder / "model.safetensors"
    weights = load_file(path)
    more = {"model.transformer.blocks.0.q_norm.weight": torch.ones(12)}
    save_file({**weights, **more}, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError, match="1 tensor is not expected"):
        load(Checkpoint(folder), device="cpu")
    name = "model.transformer.blocks.0.ff_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError, match=r"ff_proj\.weight is stored as I8"):
        load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', '{"model_type": "llama"}'])
def test_no_layout(content: str, tmp_path: Path) -> None:
    assert layout_in(tmp_path) is None
    (tmp_path / "config.json").write_text(content)
    assert layout_in(tmp_path) is None


def test_each_pattern_renames_something(tmp_path: Path) -> None:
    """A pattern that matches no tensor would stand there for nothing."""
    folder = llada_folder(tmp_path / "published", save_diffusion(tmp_path / "native"))
    layout = LAYOUTS["llada"]
    names = list(load_file(folder / "model.safetensors"))
    for pattern in layout.keys:
        without = {key: by for key, by in layout.keys.items() if key != pattern}
        short = type(layout)(**{**vars(layout), "keys": without})
        assert any(short.rename(name) != layout.rename(name) for name in names), pattern


def test_it_is_described_and_refused_where_it_cannot_be_used(tmp_path: Path) -> None:
    """By the stage, with the mask of the model's entry; what reads the manifest refuses it in one line."""
    folder = save_diffusion(tmp_path / "m", mask_token_id=None)
    path = tmp_path / "model.json"
    source = {"path": str(folder), "mask_token_id": 7, "shifted_logits": True}
    stage = ["--name", "tiny", "--source", json.dumps(source), "--output", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["models", *stage])
        main()
    found = read_manifest(path)
    assert (found["kind"], found["mask_token_id"], found["shifted_logits"]) == (
        "diffusion",
        7,
        True,
    )
    assert found["source"] == source
    with pytest.raises(AtlasError, match=r"^models\.tiny: a masked-diffusion model: the pipeline"):
        from_manifest(path)


def test_a_manifest_of_a_causal_model_says_so_and_no_more(tmp_path: Path) -> None:
    found = describe(Checkpoint(save_model(tmp_path / "m")), None)
    assert found["kind"] == "causal"
    assert not {"mask_token_id", "shifted_logits"} & found.keys()
