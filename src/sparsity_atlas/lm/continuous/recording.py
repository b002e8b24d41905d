"""Work of a GPU that is kept as it is, to be done again in one piece without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

Made = TypeVar("Made")


def pool() -> Any:
    """Memory that pieces of work share which are done one after the other."""
    return torch.cuda.graph_pool_handle()


def recorded(work: Callable[[], Made], memory: Any = None) -> tuple[Callable[[], None], Made]:
    """Record work, which is not done meanwhile.

    Args:
        work: what was done before, so that whatever is made once is there: room, compiled kernels, plans.
        memory: a `pool`; None: its own.

    Returns:
        What does the work again, and what each time lies where the work made it.

    Raises:
        RuntimeError: something in it waits for the host.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on with what they have to do with the GPU.
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        made = work()
    return graph.replay, made


def check(seen: Iterable[Tensor], again: Iterable[Tensor]) -> None:
    """See that what is recorded does what was done without.

    Args:
        seen: what was made then.
        again: what is made now.

    Raises:
        RuntimeError: it does not.
    """
    if not all(torch.equal(*pair) for pair in zip(seen, again, strict=True)):
        raise RuntimeError("what is recorded gives other numbers than what was done")
