"""What nonlinearities are called."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.activations import ACT2FN

from sparsity_atlas.loading.rectified import FATReLU
from sparsity_atlas.sites.activation import ACTIVATIONS, name_of
from sparsity_atlas.tables.training import law_of

# Of several names of one class the commonest.
SAME = {"gelu_python": "gelu", "gelu_python_tanh": "gelu_pytorch_tanh", "swish": "silu"}


@pytest.mark.parametrize("name", [*(one for one in ACTIVATIONS if one in ACT2FN), *SAME])
def test_a_module_goes_by_the_name_that_a_configuration_has(name: str) -> None:
    assert name_of(ACT2FN[name]) == SAME.get(name, name)


def test_a_class_of_its_own_goes_by_that() -> None:
    assert [name_of(one) for one in (nn.GELU(), nn.SiLU(), FATReLU(0.1), nn.SELU())] == [
        *("gelu", "silu", "fatrelu", "selu"),
    ]


def test_rectified_ones_are_of_one_law() -> None:
    """Sparsing Law's, by the name that a model's description has."""
    named = {name_of(one) for one in (ACT2FN["relu2"], FATReLU(0.1), nn.ReLU())}
    assert len({law_of(one) for one in named}) == 1
    assert law_of(name_of(ACT2FN["gelu_new"])) == law_of("silu")
