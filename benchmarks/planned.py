"""What `plan` said of a run's jobs against what they took, by rule.

    snakemake --cores 2 --configfile=MINE.yaml plan
    snakemake --cores 2 --configfile MINE.yaml
    python benchmarks/planned.py [results]

Reads what `plan` left (`logs/plan.json`) and Snakemake's records of the jobs (`benchmarks/`): seconds by the
clock, of jobs that stand in both. Of a model's captures the first does the work of all, whichever that is, so
jobs are summed by rule.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

KEY = ("model", "criterion", "site", "task")
# Planned over measured.
WITHIN = (1 / 1.3, 1.3)


def planned(results: Path) -> dict[tuple[str, ...], float]:
    """Seconds of each job, as `plan` has them."""
    content = json.loads((results / "logs" / "plan.json").read_text(encoding="utf-8"))
    return {
        (one["rule"], *(one[name] for name in KEY)): one["start"] + one["work"]
        for one in content["jobs"]
    }


def measured(results: Path) -> dict[tuple[str, ...], float]:
    """The same, as Snakemake has recorded them."""
    found = {}
    for path in (results / "benchmarks").rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            key = (one["rule_name"], *(one["wildcards"].get(name, "") for name in KEY))
            found[key] = one["s"]
    return found


def rows(results: Path) -> list[tuple[str, int, float, float]]:
    """Of each rule, and of all, the jobs, and their seconds as planned and as measured."""
    said, took = planned(results), measured(results)
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for key in said:
        if key in took:
            for rule in (key[0], "all"):
                for place, more in enumerate((1, said[key], took[key])):
                    sums[rule][place] += more
    sums["all"] = sums.pop("all", [0, 0.0, 0.0])
    return [(rule, int(count), one, other) for rule, (count, one, other) in sums.items()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", default=Path("results"), type=Path)
    found = rows(parser.parse_args().results)
    print("| jobs | | planned, s | measured, s | |\n|---|---|---|---|---|")
    for rule, count, said, took in found:
        print(f"| `{rule}` | {count} | {said:.1f} | {took:.1f} | {said / took:.2f} |")
    inside = [WITHIN[0] <= said / took <= WITHIN[1] for rule, _, said, took in found[:-1]]
    print(f"\n{sum(inside)} of {len(inside)} rules lie within 30 %")


if __name__ == "__main__":
    main()
