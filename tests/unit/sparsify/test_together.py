"""Tensors of a part counted together, as on a GPU, beside each counted as it comes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_atlas import kernels
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.kernels import cuda_zeros
from sparsity_atlas.sites.find import Part, find_parts
from sparsity_atlas.sparsify import together
from sparsity_atlas.sparsify.attach import counted
from sparsity_atlas.sparsify.counted_vectors import slots_of
from tiny_models import Strange, tiny_model, token_ids

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch counts; the CPU counts as a GPU does."""
    found: list[int] = []

    def count(tensors: list[Tensor], *arguments: Any) -> None:
        found.append(len(tensors))
        cuda_zeros.count(tensors, *arguments)

    monkeypatch.setattr(kernels, "_zeros_on", lambda *_: count)
    monkeypatch.setattr(together, "_SEEN", WeakKeyDictionary())
    return found


def counts(
    model: nn.Module, batches: list[Tensor], parts: list[Part] | None = None
) -> list[tuple[Tensor, ...]]:
    """Of each batch the first pass's zeros, those of a step of generation, and what is finite."""
    found = []
    with torch.no_grad(), counted(model, parts or find_parts(model)) as counter:
        for ids in batches:
            valid = torch.ones_like(ids, dtype=torch.bool)
            valid[0, -1] = False
            counter.expect(valid)
            model(ids)
            model(ids[:, :1])
            found.append(counter.take_unseen())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2_moe"])
def test_same_counts_as_one_by_one(
    name: str, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, initializer_range=0.3)
    parts = find_parts(model)
    # So that some are zero.
    for part in parts:
        if part.activation is not None and part.activation.module is not None:
            part.activation.module.forward = F.relu
    batches = [token_ids(2, 4), token_ids(1, 5, seed=2)]
    found = counts(model, batches, parts)
    counted_together = list(launches)
    assert all(map(torch.equal, found[0], counts(model, batches[:1], parts)[0]))
    # Where a pass has been seen, there is no first one.
    assert launches[len(counted_together) :] == counted_together[: len(counted_together) // 3] * 2
    monkeypatch.setattr(kernels, "_zeros_on", lambda *_: None)
    monkeypatch.setattr(together, "_SEEN", WeakKeyDictionary())
    for one, other in zip(found, counts(model, batches, parts), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        assert one[0].dtype == other[0].dtype
    # The first pass is counted one by one, and what experts make always.
    own = defaultdict(list)
    for slot in slots_of(parts, None):
        own[slot.key.layer, slot.key.part].append(slot.routing)
    sizes = [len(some) for some in own.values() if not any(some)]
    assert counted_together == sizes * 3
    assert max(sizes) >= 2


def test_what_large_passes_make_is_not_held(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch's tensors are counted as they come, a step's of generation together."""
    model = tiny_model("llama")
    parts = find_parts(model)
    batches = [token_ids(2, 8), token_ids(2, 8, seed=2)]
    expected = counts(model, batches, parts)
    alone = list(launches)
    launches.clear()
    # Of an FFN's two rows, as a step has them, and not of sixteen.
    most = max(sum(map(part.size, part.tensors)) for part in parts) * 2 * 4
    monkeypatch.setattr(together, "MOST_HELD", most)
    monkeypatch.setattr(together, "_SEEN", WeakKeyDictionary())
    for one, other in zip(expected, counts(model, batches, parts), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    # Of four passes the first step shows what can be counted together, and the second one is.
    assert len(alone) == 3 * len(parts)
    assert len(launches) == len(parts)


def test_what_is_computed_in_place_is_counted_as_it_comes(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [token_ids(), token_ids(seed=2)]
    found = counts(Strange("gated-in-place"), batches)
    # Those of attention only.
    assert set(launches) == {2}
    monkeypatch.setattr(kernels, "_zeros_on", lambda *_: None)
    monkeypatch.setattr(together, "_SEEN", WeakKeyDictionary())
    for one, other in zip(found, counts(Strange("gated-in-place"), batches), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_what_is_written_over_later_is_refused(launches: list[int]) -> None:
    model = tiny_model("llama")
    parts = find_parts(model)
    down = parts[-1].readers("intermediate")[0].module
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    spoil: list[bool] = []

    def change(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if spoil:
            seen[-1].zero_()

    model.model.layers[-1].mlp.up_proj.register_forward_hook(keep)
    down.register_forward_pre_hook(change)
    ids = token_ids()
    with torch.no_grad(), counted(model, parts) as counter:
        for _ in range(2):
            counter.expect(torch.ones_like(ids, dtype=torch.bool))
            model(ids)
            counter.take()
        spoil.append(True)
        counter.expect(torch.ones_like(ids, dtype=torch.bool))
        with pytest.raises(AtlasError, match=r"'up' was written over before it was counted"):
            model(ids)
    assert launches
