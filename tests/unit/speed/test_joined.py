"""Joined layers give the tokens that a model's own layers give; what they are not made for stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from emulated_device import launcher
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.decoding import backend, cluster_products, cuda_products, cuda_sources
from sparsity_atlas.decoding.cluster_products import Plan
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.find import find_parts, random_ids
from sparsity_atlas.speed.attached import Unchanged
from sparsity_atlas.speed.decoder import Decoder
from sparsity_atlas.speed.joined import Known, _Joined, joined
from sparsity_atlas.speed.replaced import replaced
from sparsity_atlas.speed.timed_rows import Constant
from sparsity_atlas.terms import TENSORS, PlaceKey
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_greedy_tokens(name: str) -> None:
    model = tiny_model(name, initializer_range=0.3)
    ids = random_ids(model, (2, 7))
    wanted, found = (Decoder(model, 2, 24) for _ in range(2))
    assert torch.equal(wanted.prompt(ids), found.prompt(ids))
    with joined(model) as layers:
        assert layers == 2
        tokens = found.go_on(10)
    assert torch.equal(tokens, wanted.go_on(10))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_are_tried_once_for_what_stands_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topp"}), parts, "all_linear_inputs")
    own, tried = _Joined.is_right, []

    def is_right(one: _Joined, turning: object) -> bool:
        tried.append(one)
        return own(one, turning)

    monkeypatch.setattr(_Joined, "is_right", is_right)
    known: Known = Unchanged()
    decoders = [Decoder(model, 2, 24) for _ in range(4)]
    ids = random_ids(model, (2, 7))
    for decoder in decoders:
        decoder.prompt(ids)
    wanted = decoders[0].go_on(10)
    for _ in range(2):
        with joined(model, known) as layers:
            assert layers == 2
    assert len(tried) == 2
    with replaced(model, parts, "all_linear_inputs", bound, 0.6) as maps:
        sparse, tokens = decoders[1].go_on(10), []
        for level in (0.6, 0.9, 0.6):
            maps.use(bound, level)
            with joined(model, known) as layers:
                assert layers == 2
                if level == 0.6:
                    tokens.append(decoders[2].go_on(5))
        assert torch.equal(torch.cat(tokens), sparse)
    assert len(tried) == 4
    with joined(model, known):
        assert torch.equal(decoders[3].go_on(10), wanted)
    assert len(tried) == 6


class _Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states)
        return found * 2


@pytest.mark.parametrize("kind", [LlamaRMSNorm, _Doubled])
def test_norm_behind_all_layers(kind: type[LlamaRMSNorm]) -> None:
    model = tiny_model("llama")
    norm = model.model.norm
    norm.__class__ = kind
    x = torch.randn(2, 1, len(norm.weight))
    wanted = norm(x)
    with joined(model):
        assert ("forward" in norm.__dict__) == (kind is LlamaRMSNorm)
        torch.testing.assert_close(norm(x), wanted)
        torch.testing.assert_close(norm(x.transpose(0, 1)), wanted.transpose(0, 1))
    assert "forward" not in norm.__dict__


def test_sparse_maps_within_joined_layers() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topp"}), parts, "all_linear_inputs")
    ids = random_ids(model, (2, 7))
    wanted, found = (Decoder(model, 2, 24) for _ in range(2))
    assert torch.equal(wanted.prompt(ids), found.prompt(ids))
    with replaced(model, parts, "all_linear_inputs", bound, 0.6):
        tokens = wanted.go_on(10)
        with joined(model) as layers:
            assert layers == 2
            assert torch.equal(found.go_on(10), tokens)


def test_layers_are_tried_as_they_are_without_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the last pass was over single tokens: an entry at its threshold may go either way."""
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    bound = bind_all(create({"rule": "topp"}), parts, "all_linear_inputs")
    decoder = Decoder(model, 2, 24)
    decoder.prompt(random_ids(model, (2, 7)))
    with replaced(model, parts, "all_linear_inputs", bound, 0.6):
        decoder.go_on(1)
        made = []
        product: Callable[..., torch.Tensor] = backend.Cpu.by_inputs

        def by_inputs(*arguments: object) -> torch.Tensor:
            made.append(arguments)
            return product(*arguments)

        monkeypatch.setattr(backend.Cpu, "by_inputs", by_inputs)
        with joined(model) as layers:
            assert layers == 2
            assert not made
            decoder.go_on(1)
            assert made


def test_norms_within_sparse_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One row by fixed thresholds: products by clusters make the norms of what they read, too."""
    model = tiny_model("llama", initializer_range=0.3)
    parts = find_parts(model)
    rule = Constant(Threshold("fixed", constants=torch.tensor([0.4])))
    keys = [
        PlaceKey(part.layer, part.name, tensor)
        for part in parts
        for tensor in TENSORS["all_linear_inputs"]
        if tensor in part.tensors
    ]
    ids = random_ids(model, (1, 7))
    wanted, found = (Decoder(model, 1, 24) for _ in range(2))
    assert torch.equal(wanted.prompt(ids), found.prompt(ids))
    with replaced(model, parts, "all_linear_inputs", dict.fromkeys(keys, rule), 0.5):
        tokens = wanted.go_on(3)
        launched = []

        def after_norm(*arguments: object) -> object:
            made = within(*arguments)
            launched.append(made is not None)
            return made

        within: Callable[..., object] = cuda_products.after_norm
        monkeypatch.setattr(cuda_products, "after_norm", after_norm)
        monkeypatch.setattr(cuda_sources, "launch", launcher(tmp_path))
        plan = Plan(32, 8, 2, 2, 1)
        monkeypatch.setattr(cluster_products, "plan_of", lambda *arguments: plan)
        monkeypatch.setattr(backend, "_backend", lambda device: backend.Cuda())
        with joined(model) as layers:
            assert layers == 2
            assert torch.equal(found.go_on(3), tokens)
    # Layers are tried without zeros; of each step both norms of both layers.
    assert launched == [True] * 12


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4", "cohere", "gpt_neox"])
def test_other_layers_stay_as_they_are(name: str) -> None:
    with joined(tiny_model(name, initializer_range=0.3)) as layers:
        assert layers == 0


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("granite", {"residual_multiplier": 0.5}, 0),
        ("smollm3", {"no_rope_layers": [1, 0]}, 1),  # one layer without a rotary embedding
    ],
)
def test_numbers_tell_layers_of_the_same_form(
    name: str, settings: dict[str, object], expected: int
) -> None:
    with joined(tiny_model(name, initializer_range=0.3, **settings)) as layers:
        assert layers == expected


def test_what_takes_other_arguments_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def by_type(x: torch.Tensor, positions: torch.Tensor, layer_type: str) -> None:
        raise AssertionError

    monkeypatch.setattr(model.model.rotary_emb, "forward", by_type)
    with joined(model) as layers:
        assert layers == 0
