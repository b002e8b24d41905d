"""Files that stay mapped for a few weights which are used as they lie in them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

# Share of a file that is used as it lies there, below which it is not kept.
USED = 0.5
# What Linux says of this process's memory; elsewhere files stay as they are.
_MAPS = Path("/proc/self/maps")


def let_go_of_files(model: nn.Module, files: Iterable[Path]) -> None:
    """Copy weights that keep a file mapped of which little is used, so that its pages go.

    A tensor of the type of the computation is a view of its file: where all others were converted, as of a
    checkpoint in bfloat16 whose router is in float32, it would keep as much again in memory.

    Args:
        model: as it was loaded.
        files: of its weights.
    """
    ranges = _mapped({str(file.resolve()) for file in files})
    for begin, end in ranges:
        views = [
            one
            for one in chain(model.parameters(), model.buffers())
            if one.device.type == "cpu" and begin <= one.data_ptr() < end
        ]
        if sum(one.nbytes for one in views) < USED * (end - begin):
            copies: dict[tuple[int, object], Tensor] = {}
            for one in views:
                # Weights that are tied stay so.
                key = (one.data_ptr(), one.shape)
                one.data = copies.setdefault(key, one.detach().clone())


def _mapped(files: set[str]) -> list[tuple[int, int]]:
    """Addresses at which files lie in this process's memory."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, *_, rest = line.split(maxsplit=5)
        if rest in files:
            begin, end = addresses.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
