"""FATReLU and ReLU on both factors: by hand, loaded, and found by the search for sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model_parts import ffns_of
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import blank, load
from sparsity_atlas.loading.rectified import DReLULlamaConfig, DReLULlamaForCausalLM, FATReLU
from sparsity_atlas.sites.find import bind_parts, describe_parts, find_parts
from sparsity_atlas.sites.shaping import Shaping

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "hidden_act": "relu", "initializer_range": 0.3},
}
IDS = torch.arange(12).view(2, 6)


def test_fatrelu_keeps_what_reaches_its_threshold() -> None:
    values = torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75])
    assert FATReLU(0.5)(values).tolist() == [0, 0, 0, 0.5, 0.75]
    assert torch.equal(FATReLU(0.0)(values), values.relu())


def saved(folder: Path, model: nn.Module, **changes: Any) -> Checkpoint:
    """A checkpoint of a model whose config.json says something else."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Checkpoint(folder)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def reads(model: nn.Module) -> Tensor:
    """What the first down projection reads, [tokens, d_ff], and what its FFN was given."""
    seen: list[Tensor] = []
    mlp = model.model.layers[0].mlp
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
        for module in (mlp, mlp.down_proj)
    ]
    with torch.inference_mode():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_checkpoint_that_says_fatrelu_is_loaded_with_its_threshold(tmp_path: Path) -> None:
    plain = llama()
    checkpoints = {
        t: saved(tmp_path / str(t), plain, hidden_act="fatrelu", hidden_act_param=t)
        for t in (0, 0.5, 1)
    }
    models = {t: load(one, dtype="float32", device="cpu") for t, one in checkpoints.items()}
    maps = plain.model.layers[0].mlp
    for threshold, model in models.items():
        x, found = (values.double() for values in reads(model))
        gate = x @ maps.gate_proj.weight.double().T
        expected = torch.where(gate >= threshold, gate, 0) * (x @ maps.up_proj.weight.double().T)
        # Of what is dropped nothing is left, and near the threshold float32 may decide otherwise.
        sure = (gate - threshold).abs() > 1e-5
        torch.testing.assert_close(found[sure], expected[sure], rtol=1e-4, atol=1e-5)
        assert torch.equal(found[sure] == 0, expected[sure] == 0)
        parts = find_parts(model)
        bound = bind_parts(model, describe_parts(parts))
        for ffn in ffns_of(bound):
            assert ffn.tensors == ("input", "up", "gate", "intermediate")
    shares = [(reads(model)[1] == 0).float().mean() for model in models.values()]
    assert shares[0] < shares[1] < shares[2]
    with torch.inference_mode():
        torch.testing.assert_close(models[0](IDS).logits, plain(IDS).logits)
    with torch.device("meta"):
        assert blank(checkpoints[1]).model.layers[0].mlp.act_fn.threshold == 1


@pytest.mark.parametrize("threshold", [None, "0.01", True, -0.1, float("nan")])
def test_fatrelu_without_a_threshold_is_refused(tmp_path: Path, threshold: Any) -> None:
    checkpoint = saved(tmp_path, llama(), hidden_act="fatrelu", hidden_act_param=threshold)
    with pytest.raises(AtlasError, match=r"hidden_act_param: found .*, expected the threshold"):
        load(checkpoint, dtype="float32", device="cpu")


def test_relu_on_both_factors_is_loaded_and_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = DReLULlamaForCausalLM(DReLULlamaConfig(**SIZES)).eval()
    # The weights of a Llama with the same seed, under the same names.
    for (name, ours), (known, theirs) in zip(
        made.state_dict().items(), llama().state_dict().items(), strict=True
    ):
        assert name == known
        assert torch.equal(ours, theirs)
    model = load(saved(tmp_path, made), dtype="float32", device="cpu")
    assert type(model) is DReLULlamaForCausalLM
    x, found = (values.double() for values in reads(model))
    mlp = model.model.layers[0].mlp
    u, g = (x @ one.weight.double().T for one in (mlp.up_proj, mlp.gate_proj))
    torch.testing.assert_close(found, u.clamp(min=0) * g.clamp(min=0), rtol=1e-4, atol=1e-5)
    bound = bind_parts(model, json.loads(json.dumps(describe_parts(find_parts(model)))))
    for ffn in ffns_of(bound):
        assert ffn.shaping == Shaping(low=0.0)
        assert ffn.tensors == ("input", "up", "gate", "intermediate")
    torch.testing.assert_close(ffns_of(bound)[0].intermediate(x.float()), found.float())
