"""The mixture's recipe: trained by a faster form of the model's own function, and asked for an even load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from sparsity_atlas.zoo import batches, expert_training, fit, recipe

TINY = recipe.Mixture(
    width=32, layers=2, ffn_width=24, learning_rate=1e-2, experts=4, active_experts=2
)
SHORT = recipe.Training(steps=40, batch_tokens=256, context=32, vocab_size=320)


@pytest.fixture
def model() -> fit.Model:
    built = fit.build_model(TINY, SHORT)
    with torch.no_grad():
        for layer in built.model.layers:  # so that routing is far from even
            layer.mlp.gate.weight.normal_()
    return built


def test_loss_and_gradients_are_the_models_own(model):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(1, SHORT.vocab_size, (3, 32), generator=generator)
    inputs = functional.pad(targets[:, :-1], (1, 0))

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(value, list(model.parameters())))

    found = fit.batch_loss(model, inputs, targets)
    own = model(inputs, output_router_logits=True)
    entropy = functional.cross_entropy(own.logits.flatten(0, 1), targets.flatten())
    # Each layer by itself, where the model's own averages over layers first.
    uneven = [load_balancing_loss_func((one,), 4, 2) for one in own.router_logits]
    expected = entropy + 0.01 * sum(uneven) / len(uneven)
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.total, expected)
    for ours, theirs in zip(gradients(found.total), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_unevenness_is_least_where_all_experts_are_met_alike():
    even = torch.eye(4)
    skewed = torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 4)
    assert expert_training.unevenness(torch.full((4, 4), 0.25), even).item() == pytest.approx(1)
    chosen = torch.tensor([[1.0, 0, 0, 0]] * 4)
    assert expert_training.unevenness(skewed, chosen).item() == pytest.approx(4 * 0.97)


def test_the_load_counts_tokens_with_a_target_in_each_layer(model):
    ids = np.random.default_rng(0).integers(1, SHORT.vocab_size, 50, dtype=np.uint16)
    inputs, targets = batches.evaluation_blocks(ids, 32)
    found = np.array(expert_training.load(model, inputs, targets))
    logits = model(torch.from_numpy(inputs), output_router_logits=True).router_logits
    valid = torch.from_numpy(targets.flatten() != batches.IGNORED)
    for layer, one in enumerate(logits):
        chosen = one[valid].topk(2).indices
        expected = [(chosen == expert).sum().item() / 50 for expert in range(4)]
        np.testing.assert_allclose(found[layer], expected)
    assert found.sum(1) == pytest.approx(2)


def test_a_mixture_has_the_middle_models_size_a_token_and_the_large_ones_in_all():
    shapes = {name: recipe.architecture(name) for name in ("medium", "large", "medium-moe")}
    mixed = shapes["medium-moe"]
    assert isinstance(mixed, recipe.Mixture)
    dense, large = (shapes[name].non_embedding_parameters for name in ("medium", "large"))
    assert mixed.active_parameters == pytest.approx(dense, rel=0.01)
    assert mixed.non_embedding_parameters == pytest.approx(large, rel=0.01)
    assert mixed.ffn_width * mixed.active_experts == shapes["medium"].ffn_width
    tiny = fit.build_model(replace(TINY, layers=3), SHORT)
    counted = sum(weight.numel() for weight in tiny.parameters())
    assert (
        counted == replace(TINY, layers=3).non_embedding_parameters + SHORT.vocab_size * TINY.width
    )
