"""That a refusal names what is wrong, where the libraries' own errors do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtures import save_mixture
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.one_line import one_line
from sparsity_atlas.loading.pretrained import load
from tiny_lm import save_model

WIDE = "[48, 32] at entry 0 and [46, 32] at entry 1"


def narrowed(*names: str) -> Callable[[str, Tensor], Tensor]:
    return lambda name, weight: weight[:-2].contiguous() if name.endswith(names) else weight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            narrowed("0.mlp.experts.1.up_proj.weight"),
            f"stack expects each tensor to be equal size, but got {WIDE}",
        ),
        (
            narrowed("experts.1.up_proj.weight"),
            f"stack expects each tensor to be equal size, but got {WIDE}, and 1 more",
        ),
        (
            lambda name, weight: (
                None if name.endswith("0.mlp.experts.1.up_proj.weight") else weight
            ),
            "Sizes of tensors must match except in dimension 1. "
            "Expected size 4 but got size 3 for tensor number 1 in the list.",
        ),
    ],
    ids=["shape", "both layers", "missing"],
)
def test_experts_that_cannot_be_joined(
    change: Callable[[str, Tensor], Tensor | None], says: str, tmp_path: Path
) -> None:
    """transformers says that there were "some issues", and has the rest in a table for its log."""
    folder = tmp_path / "m"
    save_mixture(folder, "olmoe")
    path = folder / "model.safetensors"
    tensors = {name: change(name, weight) for name, weight in load_file(path).items()}
    kept = {name: weight for name, weight in tensors.items() if weight is not None}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(AtlasError) as caught:
        load(Checkpoint(folder), device="cpu")
    assert str(caught.value) == (
        f"{folder}: cannot load model type 'olmoe': model.layers.0.mlp.experts.gate_up_proj cannot be made "
        f"of the tensors in its files: {says}"
    )


def test_the_damaged_file_among_several(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    damaged = sorted(folder.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(AtlasError) as caught:
        load(Checkpoint(folder), device="cpu")
    assert str(caught.value).startswith(f"{damaged}: damaged safetensors file (")


def test_what_lies_beneath(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "m"))
    with (
        pytest.raises(AtlasError, match=r"m: cannot: no table \(KeyError: 'rows'\)$"),
        one_line(checkpoint, "cannot"),
    ):
        raise ValueError("no table") from KeyError("rows")
    # What says it already is not made longer.
    with (
        pytest.raises(AtlasError, match=r"m: cannot: no table: 3 rows$"),
        one_line(checkpoint, "cannot"),
    ):
        raise ValueError("no table: 3 rows") from RuntimeError("3 rows")
