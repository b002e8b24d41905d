"""The stages of the L1 penalty, and what it adds to a loss."""

import math

import pytest
import torch

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo import fit, recipe
from sparsity_atlas.zoo.sparse.penalty import Stages, layer_pass
from sparsity_atlas.zoo.sparse.variants import variant

SHORT = recipe.Training(steps=4, batch_tokens=64, context=32, vocab_size=320)
TINY = recipe.Architecture(width=32, layers=2, ffn_width=48, learning_rate=1e-2)


def test_the_weight_rises_along_a_sine_between_points():
    """ProSparse's own stages for 7B parameters: nothing, a constant, two rises with a rest between."""
    points = ((5000, 0.0), (5000, 5e-3), (6000, 5e-3), (10000, 5e-2), (12000, 5e-2), (16000, 0.2))
    stages = Stages(points)
    assert [stages.weight(step) for step in (0, 4999, 5000, 5999)] == [0, 0, 5e-3, 5e-3]
    # A quarter of the way up: 1/2 (sin(-pi/4) + 1).
    risen = (1 - math.sqrt(0.5)) / 2
    assert stages.weight(7000) == pytest.approx(5e-3 + risen * 4.5e-2, rel=1e-12)
    assert stages.weight(8000) == pytest.approx(2.75e-2, rel=1e-12)
    assert [stages.weight(step) for step in (10000, 11000, 16000, 10**6)] == [5e-2, 5e-2, 0.2, 0.2]
    weights = [stages.weight(step) for step in range(0, 17000, 10)]
    assert weights == sorted(weights)


def test_stages_are_spelled_and_read():
    words = ["5:0", "5:0.005", "9:0.05"]
    stages = Stages.parse(words)
    assert stages == Stages(((5, 0.0), (5, 0.005), (9, 0.05)))
    assert stages.spelled() == words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0.1"], "found '0.1', expected STEP:WEIGHT"),
        (["4:"], "found '4:', expected STEP:WEIGHT"),
        (["4:-1"], "expected a step and a weight from 0"),
        (["4:nan"], "expected a step and a weight from 0"),
        (["9:0", "4:1"], "expected steps that do not fall"),
    ],
)
def test_stages_that_are_none_are_refused(words, expected):
    with pytest.raises(AtlasError, match=expected):
        Stages.parse(words)


FFNS = {
    "silu": lambda u, g: u * g / (1 + torch.exp(-g)),
    "gelu": lambda u, g: u * g * (1 + torch.erf(g / math.sqrt(2))) / 2,
    "relu": lambda u, g: u * torch.where(g > 0, g, 0),
    "relu2": lambda u, g: u * torch.where(g > 0, g * g, 0),
    "drelu": lambda u, g: torch.where(u > 0, u, 0) * torch.where(g > 0, g, 0),
}


@pytest.mark.parametrize("ungated", [False, True], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", FFNS)
def test_each_ffn_is_its_formula_and_the_penalty_its_l1_norm(activation, ungated):
    """In float64, by a loop over layers of which the FFN is written out; with the model's own loss."""
    if ungated and activation == "drelu":
        with pytest.raises(AtlasError, match="--ungated: drelu"):
            variant("tiny", TINY, activation, ungated)
        return
    name, shape = variant("tiny", TINY, activation, ungated)
    assert name == "tiny" + f"-{activation}" * (activation != "silu") + "-ungated" * ungated
    model = fit.build_model(shape, SHORT).double()
    with torch.no_grad():  # as initialised, products of two factors are next to nothing
        for parameter in model.parameters():
            parameter *= 5 if parameter.ndim > 1 else 1
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == shape.non_embedding_parameters + 320 * 32
    assert shape.non_embedding_parameters == TINY.non_embedding_parameters

    x = torch.randn(3, 32, dtype=torch.float64)
    for layer in model.model.layers:
        mlp = layer.mlp
        u = x @ mlp.up_proj.weight.T
        if ungated:
            i = FFNS[activation](torch.ones_like(u), u)
        else:
            i = FFNS[activation](u, x @ mlp.gate_proj.weight.T)
        torch.testing.assert_close(mlp(x), i @ mlp.down_proj.weight.T, rtol=1e-9, atol=1e-12)

    inputs, targets = torch.randint(0, 320, (2, 2, 16))
    plain = fit.batch_loss(model, inputs, targets)
    reads = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: reads.append(given[0]))
        for layer in model.model.layers
    ]
    found = fit.batch_loss(model, inputs, targets, torch.tensor(0.25, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found.entropy, plain.entropy)
    norms = sum(i.abs().sum() / 32 for i in reads)
    torch.testing.assert_close(
        (found.total - found.entropy).double(), 0.25 * norms, rtol=1e-5, atol=1e-7
    )
    found.total.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_layers_with_and_without_the_norm_are_the_same():
    model = fit.build_model(TINY, SHORT)
    hidden = torch.randn(2, 8, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(8)[None])
    layer = model.model.layers[0]
    found, _ = layer_pass(layer, hidden, rotary)
    expected = layer(hidden, attention_mask=None, position_embeddings=rotary)
    torch.testing.assert_close(found, expected)
