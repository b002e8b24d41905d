"""Count the zeros of all tensors of a part at once, when the last of them has come.

A launch for each of them, with what Python does for it, takes the host longer than a GPU takes to count: with
six tensors a layer a dense baseline of a small model waited for nothing else.
"""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sparsity_atlas import kernels
from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from sparsity_atlas.sites.find import Vectors
    from sparsity_atlas.sparsify.counter import Counter


# Of each model's parts whether what they make can be counted together, seen in the first pass of a process:
# a model is counted anew at each task.
_SEEN: WeakKeyDictionary[nn.Module, dict[tuple[int, str], bool]] = WeakKeyDictionary()

# Bytes of a part's tensors up to which they are held for each other: of more a GPU counts one in about the
# time of a launch, and what is held is not there for the pass.
MOST_HELD = 128 * 2**20


@dataclass
class _Made:
    """What a part has made in the pass in hand.

    Attributes:
        expected: tensors that it makes in a pass.
        together: whether they are counted together; None until a pass has shown whether they can be.
        held: those that have come.
        versions: of them then; what is written over has another one later.
    """

    expected: int
    together: bool | None
    held: list[Vectors] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def clear(self) -> None:
        """Hold nothing."""
        self.held, self.versions = [], []


class Together:
    """Counts what parts make, each part's tensors together where that can be and is worth it.

    A model may compute in place, so that a tensor is another one when it is counted. In a first pass each is
    counted as it comes, and of the parts whose tensors all are still as they were when the last one comes,
    they are counted together from then on, in passes of no more than `MOST_HELD`.
    """

    def __init__(
        self, model: nn.Module, counter: Counter, at_once: Callable[[Vectors], None]
    ) -> None:
        """Count for a counter.

        Args:
            model: whose parts they are.
            counter: gets the counts.
            at_once: counts a tensor as it comes.
        """
        self._seen = _SEEN.setdefault(model, {})
        self._counter = counter
        self._at_once = at_once
        slots = [((slot.key.layer, slot.key.part), slot) for slot in counter.slots]
        # Of experts' tensors rows stand in an order of their own, and are counted by expert too.
        routed = {part for part, slot in slots if slot.routing is not None}
        self._parts = {
            part: _Made(expected, False if part in routed else self._seen.get(part))
            for part, expected in Tally(part for part, _ in slots).items()
        }

    def begin_pass(self, *_: object) -> None:
        """A forward pass of the model begins (a hook calls this)."""
        for made in self._parts.values():
            if made.held:  # of a pass that did not come to its end
                made.clear()

    def add(self, vectors: Vectors) -> None:
        """Count a tensor, now or with the others of its part.

        Raises:
            AtlasError: the model has written over a tensor that it left alone in the first pass.
        """
        part = vectors.part
        made = self._parts[part.layer, part.name]
        many = _bytes_of_all(vectors) > MOST_HELD
        if many or not made.together:
            self._at_once(vectors)
        if many or made.together is False:
            return
        made.held.append(vectors)
        made.versions.append(vectors.values._version)
        if len(made.held) < made.expected:
            return
        held, versions = made.held, made.versions
        made.clear()
        changed = [
            one
            for one, version in zip(held, versions, strict=True)
            if one.values._version != version
        ]
        if made.together is None:
            made.together = not changed and _worth_it(held)
            self._seen[part.layer, part.name] = made.together
        elif changed:
            raise AtlasError(
                f"layer {part.layer}: '{changed[0].tensor}' was written over before it was counted, and was "
                f"not in the first pass; {kernels.VARIABLE}=reference counts each tensor as it comes"
            )
        else:
            self._counter.add_together(held)


def _bytes_of_all(vectors: Vectors) -> int:
    """Of all tensors of a part, of as many rows as this one has."""
    values, part = vectors.values, vectors.part
    numbers = sum(part.size(tensor) for tensor in part.tensors)
    return values.numel() // values.shape[-1] * numbers * values.itemsize


def _worth_it(held: list[Vectors]) -> bool:
    first = held[0].values
    alike = all(
        (one.values.device, one.values.dtype, one.values.shape[:-1])
        == (first.device, first.dtype, first.shape[:-1])
        for one in held
    )
    return alike and kernels.counts_together(first)
