"""How many positions a model has a table for: learned ones, or sines that were computed beforehand.

Beyond its table a model ends with an index error from inside torch, on a GPU with one that takes the
process along. Models with rotary embeddings or ALiBi have no table, and may be run beyond the length
that they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.logits.head import without_cache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Tokens that are run to see what is looked up for their positions.
TOKENS = 5


def positions(model: PreTrainedModel) -> int | None:
    """Positions in the shortest table that a model looks them up in; None if it has none.

    A few tokens are run, and every lookup of consecutive rows is one of positions: the tokens
    themselves are not consecutive.
    """
    with _Lookups() as seen:
        _run(model, TOKENS)
    return min(seen.found, default=None)


def check_positions(model: PreTrainedModel, wanted: int, key: str) -> None:
    """Refuse sequences that are longer than the model's table of positions, or of no length.

    Args:
        model: the model.
        wanted: tokens of the longest sequence.
        key: of the configuration, which says so.

    Raises:
        AtlasError: names the key, and what the model has.
    """
    if wanted < 2:
        raise AtlasError(
            f"{key}: {wanted} tokens by the model's config.json; set how many it can run"
        )
    found = positions(model)
    if found is None or wanted <= found or _grows(model, found):
        return
    raise AtlasError(
        f"{key}: {wanted} tokens, but the model has {found} positions; set at most {found}"
    )


def _grows(model: PreTrainedModel, found: int) -> bool:
    """Whether the model makes its table longer where it must; only a CPU can be asked in safety."""
    if model.device.type != "cpu":
        return False
    try:
        _run(model, found + 1)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _run(model: PreTrainedModel, count: int) -> None:
    ids = torch.tensor([3, 5], device=model.device).repeat(count // 2 + 1)[None, :count]
    with torch.no_grad():
        # Past the hooks on the model itself, which count an evaluation's passes.
        model.forward(ids, **without_cache(model))


class _Lookups(TorchDispatchMode):
    """Notes how far the tables reach in which consecutive rows are looked up.

    Attributes:
        found: positions of each of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for rows, index in _looked_up(func.overloadpacket.__name__, args):
            first = _first_of_consecutive(index)
            # As many rows as tokens: something of the tokens' own.
            if first is not None and rows != TOKENS:
                self.found.append(rows - first)
        return func(*args, **(kwargs or {}))


def _looked_up(name: str, args: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
    """Tables of an operation, as their number of rows and what is looked up in them."""
    match name:
        case "embedding":
            yield args[0].shape[0], args[1]
        case "index":
            for dim, index in enumerate(args[1]):
                if (
                    index is not None
                    and not index.is_floating_point()
                    and index.dtype != torch.bool
                ):
                    yield args[0].shape[dim], index
        case "index_select" | "gather":
            yield args[0].shape[args[1]], args[2]


def _first_of_consecutive(index: Tensor) -> int | None:
    """The first of TOKENS consecutive numbers that an index has along one axis, the same in all others."""
    for axis, size in enumerate(index.shape):
        if size != TOKENS:
            continue
        one = index.movedim(axis, -1).reshape(-1, TOKENS)
        if bool((one == one[:1, :1] + torch.arange(TOKENS, device=one.device)).all()):
            return int(one[0, 0])
    return None
