"""What was found out about a layer holds while the same stands in it, and no longer."""

from __future__ import annotations

from torch import nn

from sparsity_atlas.speed.attached import Unchanged, attached


def test_a_layer_is_asked_again_when_something_else_hangs_on_it() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    known, asked = Unchanged[int](), []

    def find() -> int:
        asked.append(len(asked))
        return len(asked)

    assert known.of(0, layer, find) == 1
    assert known.of(0, layer, find) == 1
    # Each layer by itself.
    assert known.of(1, layer, find) == 2
    handle = layer[0].register_forward_pre_hook(lambda *given: None)
    assert known.of(0, layer, find) == 3
    assert known.of(0, layer, find) == 3
    handle.remove()
    assert known.of(0, layer, find) == 4
    for forward in (layer[1].forward, lambda x: x):
        layer[1].forward = forward  # type: ignore[method-assign]
        before = len(asked)
        assert known.of(0, layer, find) == before + 1
        assert known.of(0, layer, find) == before + 1
    assert attached(layer) == [None, None, forward]
    del layer[1].forward
    assert known.of(0, layer, find) == 7


def test_nothing_found_is_found_once() -> None:
    known, asked = Unchanged[None](), []
    for _ in range(3):
        known.of(0, nn.ReLU(), lambda: asked.append(1))
    assert asked == [1]
