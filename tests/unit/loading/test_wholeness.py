"""A checkpoint that is not all of its model is refused; what older releases wrote beside it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixtures import save_mixture
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.loading.wholeness import is_constant, not_finite
from sparsity_atlas.models.manifest import describe
from tiny_lm import save_model
from tiny_models import ARCHITECTURES, tiny_model, token_ids

Weights = dict[str, Tensor]
MASK = torch.ones(1, 1, 8, 8).tril()


def changed(folder: Path, change: Callable[[Weights], Weights]) -> Checkpoint:
    """A checkpoint whose tensors are those of a whole one, changed."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return Checkpoint(folder)


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if not any(p in k for p in parts)}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): v for name, v in weights.items()}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": v for name, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("lm_head"), r"1 tensor is missing \(lm_head\.weight\)"),
        (
            without("lm_head", "layers.1.mlp"),
            r"4 tensors are missing \(lm_head\.weight, model\.layers\.1\.mlp\.down_proj\.weight, ",
        ),
        (without("layernorm"), r"4 tensors are missing \(model\.layers\.0\.input_layernorm"),
        (
            prefixed("_orig_mod."),
            r"missing .*; 21 .* not expected .*'_orig_mod\.' .*torch\.compile",
        ),
        (prefixed("module."), r"'module\.' in their names, which DataParallel"),
        (prefixed("mine."), r"'mine\.' in their names: save"),
        (renamed("layers.", "layers._orig_mod."), r"'_orig_mod\.' in their names, which torch"),
        (
            renamed("self_attn", "attention"),
            r"8 tensors are missing .*; 8 tensors are not expected",
        ),
        (
            renamed("up_proj.weight", "up_proj.qweight"),
            r"'\*\.qweight' is packed, as GPTQ or AWQ does it, and config.json has no quantization_config",
        ),
        (
            lambda weights: {**weights, "v_head.weight": torch.ones(1, 24)},
            r"1 tensor is not expected \(v_head\.weight\)$",
        ),
        (
            lambda weights: {**weights, "lm_head.weight": torch.ones(310, 24)},
            r"1 tensor has another shape \(lm_head\.weight: \[310, 24\] in the file, \[300, 24\] by",
        ),
    ],
)
def test_what_is_not_the_model(
    change: Callable[[Weights], Weights], says: str, tmp_path: Path
) -> None:
    checkpoint = changed(save_model(tmp_path / "m"), change)
    with pytest.raises(AtlasError, match=says) as caught:
        load(checkpoint, device="cpu")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_weights_without_their_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers takes them for the numbers that they are."""

    def rounded(weights: Weights) -> Weights:
        return {**weights, "lm_head.weight": (100 * weights["lm_head.weight"]).to(dtype)}

    checkpoint = changed(save_model(tmp_path / "m"), rounded)
    with pytest.raises(AtlasError, match=r"lm_head\.weight is stored as [IF]\w+; expected F32, "):
        load(checkpoint, device="cpu")


def test_an_expert_without_its_scales(tmp_path: Path) -> None:
    """It lies in the file under a name of its own, and becomes a part of a larger tensor."""
    save_mixture(tmp_path / "m", "olmoe")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"

    def rounded(weights: Weights) -> Weights:
        return {**weights, name: (100 * weights[name]).to(torch.int8)}

    with pytest.raises(AtlasError, match=rf"{re.escape(name)} is stored as I8; expected F32, "):
        load(changed(tmp_path / "m", rounded), device="cpu")


def test_no_process_draws_weights(tmp_path: Path) -> None:
    """The same refusal in every stage, since all load by one function."""
    folder = save_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(AtlasError, match=r"9 tensors are missing \(model\.layers\.2\."):
        load(Checkpoint(folder), device="cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # As on the Hub, without the base model's prefix, and with masks that were saved once.
        ("gpt2", renamed("transformer.", "")),
        ("gpt2", lambda weights: {**weights, "transformer.h.0.attn.bias": MASK}),
        ("gpt_neox", lambda weights: {**weights, "gpt_neox.layers.0.attention.bias": MASK.bool()}),
        ("llama", lambda weights: {**weights, "model.layers.0.mask": MASK}),
        ("llama", lambda weights: {**weights, "model.masked_bias": torch.tensor(-1e9)}),
        ("llama", lambda weights: {**weights, "model.position_ids": torch.arange(64)[None]}),
        (
            "llama",
            lambda weights: {
                **weights,
                "model.rotary.inv_freq": 10000 ** -(torch.arange(0, 8, 2) / 8).half(),
            },
        ),
        ("llama", renamed("model.", "")),
    ],
)
def test_what_older_releases_saved(
    name: str, change: Callable[[Weights], Weights], tmp_path: Path
) -> None:
    whole = tiny_model(name)
    whole.save_pretrained(tmp_path)
    loaded = load(changed(tmp_path, change), device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, whole(token_ids()).logits)


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head(tie: bool, tmp_path: Path) -> None:
    """A head that is the embedding need not be in the file."""
    folder = save_model(tmp_path / "m", tie_word_embeddings=tie)
    checkpoint = changed(folder, without("lm_head"))
    if tie:
        model = load(checkpoint, device="cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        with pytest.raises(AtlasError, match="lm_head"):
            load(checkpoint, device="cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_is_whole(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = load(Checkpoint(tmp_path), device="cpu")
    for (key, value), found in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(value, found), key


def test_pickled_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    checkpoint = Checkpoint(folder, allow_pickle=True)
    torch.save({**weights, "model.layers.0.mask": MASK}, folder / "pytorch_model.bin")
    load(checkpoint, device="cpu")
    torch.save({**weights, "v_head.weight": MASK[0, 0, :2]}, folder / "pytorch_model.bin")
    with pytest.raises(AtlasError, match="v_head"):
        load(checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("tensor", "constant"),
    [
        (torch.ones(4, 4).tril().bool(), True),
        (torch.full((4, 4), -1e4).triu(1), True),
        (torch.tensor(-1e9), True),
        (torch.tensor(0.5), False),
        (torch.arange(5), True),
        (torch.tensor([1.0, 0.1, 0.01, 0.001]), True),
        (torch.tensor([1.0, 0.9, 0.2, 0.1]), False),
        (torch.ones(4), False),
        (torch.zeros(4, 4), False),
        (torch.randn(4, 4), False),
        (torch.randn(4, 4).tril(), False),
        (torch.zeros(0), False),
    ],
)
def test_constants(tensor: Tensor, constant: bool) -> None:
    assert is_constant(tensor) is constant


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_no_numbers(value: float, kind: str, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(weights: Weights) -> Weights:
        weights[name][3, 5:7] = value
        return weights

    checkpoint = changed(save_model(tmp_path / "m"), spoil)
    with pytest.raises(AtlasError, match=rf"{name}: 2 of 960 values are {kind}$"):
        describe(checkpoint, None)


def test_weights_that_are_no_numbers_beside_the_ffns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All scores are NaN then, which each node says: a result."""

    def spoil(weights: Weights) -> Weights:
        weights["model.norm.weight"][:] = float("nan")
        return weights

    assert describe(changed(save_model(tmp_path / "m"), spoil), None)["layers"] == 2
    assert "model.norm.weight: 24 of 24 values are NaN" in caplog.text


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that anything makes."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple) else (found,):
            if torch.is_tensor(one) and not any(one is given for given in args):
                self.entries = max(self.entries, one.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_looked_at_without_a_copy_of_them(dtype: torch.dtype) -> None:
    """`isfinite` makes masks and a copy: of a vocabulary of 262,144 more than all else in that job takes."""
    model = tiny_model("llama").to(dtype)
    with _Largest() as largest:
        assert not_finite(model) is None
    assert largest.entries <= 1


@pytest.mark.parametrize(
    ("value", "kind"), [("nan", "NaN"), ("inf", "infinite"), ("-inf", "infinite")]
)
def test_one_number_that_is_none_is_seen(value: str, kind: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float(value)
    found = not_finite(model)
    assert found == f"lm_head.weight: 1 of {model.lm_head.weight.numel():,} values are {kind}"


SHORT = [getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4"))]


@pytest.mark.parametrize("kind", [one for one in SHORT if "float8" in str(one)], ids=str)
def test_packed_numbers_of_eight_bits(kind: torch.dtype) -> None:
    """torch neither orders them nor asks all of their types whether they are finite."""
    model = nn.Linear(8, 4, bias=False)
    numbers = torch.full((4, 8), 0.5)
    model.weight = nn.Parameter(numbers.to(kind), requires_grad=False)
    assert not_finite(model) is None
    numbers[1, 2] = torch.nan
    model.weight = nn.Parameter(numbers.to(kind), requires_grad=False)
    assert not_finite(model) == "weight: 1 of 32 values are NaN"


@pytest.mark.parametrize("kind", [one for one in SHORT if "float4" in str(one)], ids=str)
def test_packed_pairs_of_four_bits(kind: torch.dtype) -> None:
    model = nn.Linear(8, 4, bias=False)
    pairs = torch.randint(256, (4, 4), dtype=torch.uint8).view(kind)
    model.weight = nn.Parameter(pairs, requires_grad=False)
    assert not_finite(model) is None
