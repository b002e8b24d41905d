"""What a run says of the time that is left against what was left.

    python benchmarks/time_left.py [--step 10] -- --cores all --configfile workflow/config/smoke.yaml

Runs Snakemake with the words behind `--`, shows what it prints, and at the end a table: every so many
seconds what had been said last, less what has passed since, against what was left in fact; and of these
ticks, from a tenth of the run on, how many lie within a factor of 1.5, and the worst. A tick at which nothing
had been said lies outside; the last one, with less than a step to go, is left out.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from typing import NamedTuple

SAID = re.compile(r"about ([\d.]+) (s|min|h) left$")
WITHIN = 1.5
SECONDS = {"s": 1, "min": 60, "h": 3600}


def watch(words: list[str]) -> tuple[list[tuple[float, float]], float]:
    """Run Snakemake: of each such line (seconds since the start, seconds left as it said); what it took."""
    began, said = time.monotonic(), []
    command = [sys.executable, "-m", "snakemake", "--nocolor", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            if found := SAID.search(line.rstrip()):
                left = float(found[1]) * SECONDS[found[2]]
                said.append((time.monotonic() - began, left))
    if process.returncode:
        raise SystemExit(process.returncode)
    return said, time.monotonic() - began


class Tick(NamedTuple):
    """Seconds since a run's start, that it said were left (None: nothing yet), and that were left."""

    now: float
    said: float | None
    left: float

    @property
    def ratio(self) -> float:
        """Of what was said to what was left; 0 where nothing was."""
        return (self.said or 0.0) / self.left


def ticks(said: list[tuple[float, float]], took: float, step: float) -> list[Tick]:
    """What a run that took so many seconds said, in steps; see `watch`."""
    found = []
    for number in range(1, int(took / step) + 1):
        now = number * step
        if took - now < step:
            break
        last = max((one for one in said if one[0] <= now), default=None)
        left = None if last is None else max(last[1] - (now - last[0]), 0.0)
        found.append(Tick(now, left, took - now))
    return found


def verdict(every: list[Tick], took: float) -> str:
    """How many ticks from a tenth of the run on lie within the factor, and the worst of them."""
    ratios = [one.ratio for one in every if one.now >= took / 10]
    if not ratios:
        return f"No tick from a tenth of {took:.0f} s on: take a smaller --step"
    within = sum(1 / WITHIN <= one <= WITHIN for one in ratios)
    worst = max(ratios, key=lambda one: max(one, 1 / one) if one else math.inf)
    return (
        f"From a tenth of {took:.0f} s on {within} of {len(ratios)} ticks ({within / len(ratios):.0%}) lie "
        f"within a factor of {WITHIN}; {min(ratios):.2f} to {max(ratios):.2f}, the worst {worst:.2f}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=10.0, help="seconds between two rows")
    parser.add_argument("words", nargs="+", help="for Snakemake")
    arguments = parser.parse_args()
    said, took = watch(arguments.words)
    every = ticks(said, took, arguments.step)
    print("| past, s | of the run | said left, s | was left, s | ratio |\n|---|---|---|---|---|")
    for now, left, was in every:
        told, ratio = ("nothing", "") if left is None else (f"{left:.0f}", f"{left / was:.2f}")
        print(f"| {now:.0f} | {now / took:.0%} | {told} | {was:.0f} | {ratio} |")
    print(f"\n{verdict(every, took)}")


if __name__ == "__main__":
    main()
