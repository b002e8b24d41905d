"""What find_experts proves, and what it refuses in one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixtures import EACH, HIDDEN, WIDTH, tiny_mixture
from sparsity_atlas import kernels
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.experts.discovery import find_experts
from sparsity_atlas.sites.experts.implementation import NAME, installed
from sparsity_atlas.sites.experts.routed import by_token
from sparsity_atlas.sites.find import find_parts

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Any:
    return tiny_mixture("olmoe")


def call(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda ids: model(input_ids=ids, use_cache=False)


def test_found(model: Any) -> None:
    found = find_experts(model, IDS, call(model))
    assert [one.path for one in found] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert {(one.each, one.hidden, one.tensors) for one in found} == {
        (EACH, HIDDEN, ("input", "up", "gate", "intermediate"))
    }
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


DBRX = {
    **{"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96},
    "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": EACH}
    | {"hidden_size": HIDDEN},
}


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("dbrx", r"transformer\.blocks\.0\.ffn\.experts \(DbrxExperts\)"),
        ("jetmoe", r"model\.layers\.0\.mlp\.input_linear \(JetMoeParallelExperts\)"),
        ("longcat_flash", r"model\.layers\.0\.mlp\.experts \(LongcatFlashExperts\)"),
        ("step3p7", r"language_model\.layers\.1\.mlp\.experts \(Step3p7Experts\)"),
    ],
)
def test_outside_the_interface(family: str, place: str) -> None:
    if family == "dbrx":
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model("dbrx", **DBRX)).eval()
    else:
        other = tiny_mixture(family)
    why = "do not go through transformers' experts interface: what each expert reads and makes cannot be"
    with pytest.raises(AtlasError, match=f"{place} holds experts that {why}") as caught:
        find_parts(other)
    assert "\n" not in str(caught.value)


def test_modules_one_an_expert(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
    with pytest.raises(
        AtlasError, match=r"mlp\.experts \(ModuleList\) holds experts that do not go"
    ):
        find_experts(model, IDS, call(model))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised(model: Any, dtype: torch.dtype) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(dtype), requires_grad=False)
    with pytest.raises(AtlasError, match=r"quantised experts .*: load the model dequantised"):
        find_experts(model, IDS, call(model))


def test_forward_of_its_own(model: Any) -> None:
    """A class whose forward does more than the interface's functions."""
    experts = model.model.layers[1].mlp.experts
    experts.act_fn = nn.ReLU()  # which forward uses, and not the gate:
    experts._apply_gate = lambda z: torch.tanh(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1]
    with pytest.raises(
        AtlasError, match=r"layers\.1\.mlp\.experts: its own forward pass .* differ"
    ):
        find_experts(model, IDS, call(model))


def test_weights_that_the_interface_does_not_know(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.is_transposed = True
    experts.gate_up_proj = nn.Parameter(torch.randn(4, HIDDEN, 2 * WIDTH))
    with pytest.raises(RuntimeError):
        find_experts(model, IDS, call(model))


def test_runs_twice(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + own(x)
    with pytest.raises(AtlasError, match="run several times in one forward pass"):
        find_experts(model, IDS, call(model))


def test_does_not_run(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(AtlasError, match="do not run in a forward pass"):
        find_experts(model, IDS, call(model))


def test_rows_that_are_no_tokens(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x[:, :4].contiguous()).repeat(1, 2, 1)
    with pytest.raises(AtlasError, match="8 rows for 16 tokens"):
        find_experts(model, IDS, call(model))


def test_tokens_of_sequences_in_turn(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x.transpose(0, 1).contiguous()).transpose(0, 1)
    with pytest.raises(AtlasError, match="one sequence behind the other"):
        find_experts(model, IDS, call(model))


def test_experts_that_there_are_not(model: Any) -> None:
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, out: (*out[:2], out[2] * 0 + 4))
    with pytest.raises(AtlasError, match="tokens go to experts 4 to 4, of which there are 4"):
        find_experts(model, IDS, call(model))


def test_a_model_that_keeps_its_implementation(model: Any) -> None:
    model.model.layers[0].mlp.experts.config = type(
        "Config", (), {"_experts_implementation": "eager"}
    )
    with pytest.raises(AtlasError, match="does not let the implementation"):
        find_experts(model, IDS, call(model))


def test_generation_keeps_the_implementation(model: Any) -> None:
    with torch.no_grad(), installed(model):
        made = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
        assert set(model.get_experts_implementation().values()) == {NAME}
    with torch.no_grad():
        assert torch.equal(made, model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False))


def test_batch_size_changes_no_count(model: Any) -> None:
    found = find_experts(model, IDS, call(model))
    rule = Threshold("share", 0.9)

    def counts(ids: Tensor) -> Tensor:
        seen = []

        def act(grouping: Any, read: Tensor, write: Tensor) -> Tensor:
            out, zeros, *_ = kernels.masked(rule, read, write)
            seen.append(by_token(grouping, zeros).view(ids.shape))
            return out

        with torch.no_grad(), installed(model), ExitStack() as stack:
            for experts in found:
                experts.tap(stack, "intermediate", act)
            call(model)(ids)
        return torch.stack(seen)

    together = counts(IDS.repeat(2, 1))
    alone = torch.cat([counts(one[None]) for one in IDS.repeat(2, 1)], 1)
    assert torch.equal(together, alone)
    assert together.any()
