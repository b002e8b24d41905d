"""Minimal pairs: two sentences that differ in one place, of which one is grammatical.

Command line: sparsity-atlas zoo pairs --out FOLDER --items 3000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo.lexicon import Lexicon, apply_switch, fill, load_lexicon, read_yaml
from sparsity_atlas.zoo.task_files import choice_task, group_task, write_jsonl

CONTRAST = re.compile(r"\[([^\[\]|/]*)([|/])([^\[\]|/]*)\]")
# Far more than a frame with words to spare ever needs.
MAX_DRAWS = 2000


def load_phenomena() -> dict[str, dict[str, Any]]:
    """Per phenomenon: `about`, one sentence, and `frames`, template id → frame."""
    return read_yaml("pairs.yaml")


def contrast(frame: str, switch: int) -> tuple[str, str]:
    """The good and the bad sentence of a frame, slots still open."""
    found = CONTRAST.findall(frame)
    if len(found) != 1:
        raise AtlasError(f"frame '{frame}': {len(found)} contrasts [a|b] or [a/b], must be 1")
    first, kind, second = found[0]
    good, bad = (second, first) if kind == "/" and switch else (first, second)
    before, *_, after = CONTRAST.split(frame)
    return apply_switch(before + good + after, switch), apply_switch(before + bad + after, switch)


def generate(
    phenomenon: str, frames: dict[str, str], seed: int, lexicon: Lexicon | None = None
) -> Iterator[dict[str, Any]]:
    """Items without end: each round gives one item of every template, in shuffled order.

    So every prefix covers the templates evenly, and a shorter draw is a prefix of a longer one.
    No two items share all content words (inflection undone), as pairs or as single sentences.
    `answer` is the index of the good sentence in `choices`, by a fair coin. AtlasError: a template
    has no unused words left.
    """
    lexicon = lexicon or load_lexicon()
    rng = random.Random(f"{phenomenon} {seed}")
    used: set[frozenset[str]] = set()
    templates = list(frames)
    count = 0
    while True:
        rng.shuffle(templates)
        for template in templates:
            good, bad = _draw(phenomenon, template, frames[template], lexicon, used, rng)
            answer = rng.randrange(2)
            yield {
                "id": f"{phenomenon}-{count:04d}",
                "phenomenon": phenomenon,
                "template": f"{phenomenon}-{template}",
                "choices": [bad, good] if answer else [good, bad],
                "answer": answer,
            }
            count += 1


def _draw(
    phenomenon: str,
    template: str,
    frame: str,
    lexicon: Lexicon,
    used: set[frozenset[str]],
    rng: random.Random,
) -> tuple[str, str]:
    for _ in range(MAX_DRAWS):
        switch = rng.randrange(2)
        filled = fill(contrast(frame, switch), lexicon, switch, rng)
        if filled is None:
            continue
        good, bad = filled[0]
        content = {lexicon.content(text) for text in (good, bad, f"{good} {bad}")}
        if used.isdisjoint(content):
            used |= content
            return good, bad
    raise AtlasError(f"{phenomenon}-{template}: no new words in {MAX_DRAWS} draws; ask for fewer")


def write(folder: Path, items: int, seed: int) -> None:
    """Write the data and the lm-eval task of every phenomenon, and the group over them all."""
    folder.mkdir(parents=True, exist_ok=True)
    phenomena = load_phenomena()
    for name, entry in phenomena.items():
        write_jsonl(folder / f"{name}.jsonl", islice(generate(name, entry["frames"], seed), items))
        task = choice_task(f"atlas_{name}", f"{name}.jsonl", f"Minimal pairs: {entry['about']}")
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    group = group_task("atlas_pairs", [f"atlas_{name}" for name in phenomena])
    (folder / "pairs.yaml").write_text(group, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--items", type=int, default=3000, help="pairs per phenomenon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.out, args.items, args.seed)
