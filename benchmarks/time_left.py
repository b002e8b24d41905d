"""What a run says of the time that is left against what was left.

    python benchmarks/time_left.py [--step 10] -- --cores all --configfile workflow/config/smoke.yaml

Runs Snakemake with the words behind `--`, shows what it prints, and at the end a table: every so many
seconds what had been said last, less what has passed since, against what was left in fact.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time

SAID = re.compile(r"about ([\d.]+) (s|min|h) left$")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=float, default=10.0, help="seconds between two rows")
    parser.add_argument("words", nargs="+", help="for Snakemake")
    arguments = parser.parse_args()
    said, took = watch(arguments.words)
    print("| past, s | of the run | said left, s | was left, s | ratio |\n|---|---|---|---|---|")
    ratios = []
    for step in range(1, int(took / arguments.step) + 1):
        now = step * arguments.step
        last = max((one for one in said if one[0] <= now), default=None)
        if last is None or took - now < arguments.step:
            continue
        left = max(last[1] - (now - last[0]), 0.0)
        ratio = left / (took - now)
        if now >= took / 10:
            ratios.append(ratio)
        print(f"| {now:.0f} | {now / took:.0%} | {left:.0f} | {took - now:.0f} | {ratio:.2f} |")
    if ratios:
        print(f"\nFrom a tenth of {took:.0f} s on: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
