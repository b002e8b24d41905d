"""How much of its work a stage has done, a line in its log: `drawn 3 of 17 figures`.

Snakemake's terminal reads these lines (`snakemake_logger_plugin_atlas`): when the first of them comes, the
job has started, with imports, weights and kernels behind it, and from then on they say how fast it works.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

from sparsity_atlas import cli

# A line says no less than such a share of the whole, nor is it sooner after the one before, in seconds.
STEP, EVERY = 0.02, 1.0
_LINE = re.compile(r"[a-z]+ (?P<done>\d+(\.\d+)?) of (at most )?(?P<of>\d+(\.\d+)?)( [a-z ]+)?")

_Item = TypeVar("_Item")
_logger = cli.logger.getChild("progress")


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Say nothing meanwhile: what a terminal shows is no log of a job."""
    _logger.disabled = True
    try:
        yield
    finally:
        _logger.disabled = False


class Progress:
    """Says how much is done, not too often."""

    def __init__(self, verb: str, of: float, unit: str = "", *, most: bool = False) -> None:
        """Begin with nothing.

        Args:
            verb: what is done, one word: `drawn`.
            of: how much there is to do.
            unit: of what.
            most: whether it may turn out to be less.
        """
        self._text = f"{verb} {{:.4g}} of {'at most ' * most}{of:.4g} {unit}".rstrip()
        self._of, self._said, self._at = of, 0.0, float("-inf")

    def reach(self, done: float) -> None:
        """So much is done now. What is said first is said at once, and so is the last."""
        now = time.monotonic()
        least = STEP * self._of if self._said else 0.0
        enough = done - self._said >= least and now - self._at >= EVERY
        if done > self._said and (enough or done >= self._of):
            _logger.info("%s", self._text.format(done))
            self._said, self._at = done, now


def told(items: Sequence[_Item], verb: str, unit: str) -> Iterator[_Item]:
    """Items one by one, and a line whenever some of them are done.

    Args:
        items: to go through.
        verb: see `Progress`.
        unit: likewise.
    """
    progress = Progress(verb, len(items), unit)
    for number, item in enumerate(items, 1):
        yield item
        progress.reach(number)


def read(line: str) -> tuple[float, float] | None:
    """What a line of a log says is done, and of how much; None if it is another line."""
    found = _LINE.fullmatch(line)
    return (float(found["done"]), float(found["of"])) if found else None


class ShareDone:
    """How much of a node's evaluation is done, whose tasks are run in whatever order.

    It goes by positions of their passes, padding included.
    """

    def __init__(self, names: Iterable[str], told: Callable[[float], None]) -> None:
        """Before the first of them.

        Args:
            names: of the tasks.
            told: takes the share, from 0 to 1.
        """
        self._sizes: dict[str, int | None] = dict.fromkeys(names)
        self._told = told
        self._done = 0
        self._ends: list[int] = []

    def know(self, name: str, positions: Sequence[int]) -> None:
        """The requests of a task are built."""
        if self._sizes.get(name, 0) is None:
            self._sizes[name] = sum(positions)

    def leave(self, name: str) -> None:
        """A task is not run."""
        self._sizes.pop(name, None)

    def begin(self, name: str, positions: Sequence[int]) -> None:
        """A task is run from here on."""
        self.know(name, positions)
        self._ends = [0, *accumulate(positions)]

    def ran(self, count: int, now: bool) -> None:
        """So many of its batches have been run, the last of them now or before an interruption."""
        if not now:
            return  # what is only read says nothing of the pace
        known = [size for size in self._sizes.values() if size is not None]
        # Of tasks whose requests are not built yet nothing is known, so they are like the others.
        total = sum(known) / len(known) * len(self._sizes)
        self._told((self._done + self._ends[min(count, len(self._ends) - 1)]) / total)

    def end(self, name: str) -> None:
        """A task is done, or has failed."""
        if self._sizes.get(name) is None:
            self.leave(name)
        self._done += self._sizes.get(name) or 0
        self._ends = [0]
