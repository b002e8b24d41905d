"""The cloze task: which of four words ends the context?

Command line: sparsity-atlas zoo cloze --out FOLDER --items 1500 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.zoo.lexicon import Lexicon, alternatives, fill, load_lexicon, read_yaml
from sparsity_atlas.zoo.task_files import choice_task, write_jsonl

CHOICES = 4
MAX_DRAWS = 500
ANSWER = re.compile(r" \[([^\[\]]+)\]$")


class Frame(NamedTuple):
    """A context that lacks its last word."""

    kind: str
    family: str
    text: str


def load_frames(source: dict[str, Any]) -> dict[str, Frame]:
    """Template id → frame, over the three kinds of cloze.yaml."""
    frames = {}
    for field, texts in source["fields"].items():
        for key, text in texts.items():
            frames[f"{field}-{key}"] = Frame("fields", field, text)
    for kind in ("pairs", "mention"):
        texts = source["pairs"]["frames"] if kind == "pairs" else source["mention"]
        for key, text in texts.items():
            frames[f"{kind}-{key}"] = Frame(kind, key.partition("-")[0], text)
    return frames


class Drawn(NamedTuple):
    """A context, its word, and the wrong words that it can be offered with."""

    context: str
    word: str
    others: list[str]


class Cloze:
    """The frames, and the words that each kind of frame chooses from."""

    def __init__(self, source: dict[str, Any] | None = None, lexicon: Lexicon | None = None):
        source = source or read_yaml("cloze.yaml")
        self.lexicon = lexicon or load_lexicon()
        self.frames = load_frames(source)
        self.partners = {
            kind: [tuple(pair.split()) for pair in words.split(",")]
            for kind, words in source["pairs"]["words"].items()
        }
        self.field_words = {
            field: sorted({word for text in texts.values() for word in _answers(text)})
            for field, texts in source["fields"].items()
        }
        self.domains = [fields.split() for fields in source["domains"].values()]
        partner_words = [word for pairs in self.partners.values() for p in pairs for word in p]
        field_words = [word for words in self.field_words.values() for word in words]
        listed = [word for frame in self.frames.values() for word in alternatives(frame.text)]
        self.own_words = {*partner_words, *field_words, *listed}

    def draw(self, frame: Frame, rng: random.Random) -> Drawn | None:
        """An item without its places, or None where a word came twice: draw again."""
        if frame.kind == "pairs":
            first, word = rng.choice(self.partners[frame.family])
            fixed = {"first": {"base": first}, "second": {"base": word}}
            filled = fill([frame.text], self.lexicon, 0, rng, fixed)
            others = [pair[1] for pair in self.partners[frame.family] if first not in pair]
        elif frame.kind == "fields":
            word = rng.choice(_answers(frame.text))
            filled = fill([ANSWER.sub("", frame.text)], self.lexicon, 0, rng)
            (domain,) = (fields for fields in self.domains if frame.family in fields)
            rest = [field for field in domain if field != frame.family]
            others = [other for field in rest for other in self.field_words[field]]
        else:
            (slot,) = _answers(frame.text)
            name, _, form = slot.partition(".")
            filled = fill([ANSWER.sub("", frame.text)], self.lexicon, 0, rng)
            word = filled[1][name][form] if filled else ""
            others = [row[form] for row in self.lexicon.classes[name]]
        if filled is None:
            return None
        (context,), _ = filled
        said = set(re.findall(r"[a-z]+", context.lower())) | {word}
        return Drawn(context, word, sorted(set(others) - said))

    def generate(self, seed: int) -> Iterator[dict[str, Any]]:
        """Items without end, in rounds over the templates, as `pairs.generate` gives them.

        No two items share all content words of context and answer. A template that runs out of
        unused words drops out of later rounds; AtlasError when none is left.
        """
        rng = random.Random(f"cloze {seed}")
        used: set[frozenset[str]] = set()
        templates = list(self.frames)
        count = 0
        while templates:
            rng.shuffle(templates)
            for template in list(templates):
                drawn = self._draw_unused(self.frames[template], used, rng)
                if drawn is None:
                    templates.remove(template)
                    continue
                if len(drawn.others) < CHOICES - 1:
                    found = f"{len(drawn.others)} wrong words, must be {CHOICES - 1} or more"
                    raise AtlasError(f"cloze frame {template}: {found}")
                choices = rng.sample(drawn.others, CHOICES - 1)
                answer = rng.randrange(CHOICES)
                choices.insert(answer, drawn.word)
                yield {
                    "id": f"cloze-{count:04d}",
                    "template": template,
                    "context": drawn.context,
                    "choices": choices,
                    "answer": answer,
                }
                count += 1
        raise AtlasError(f"cloze: words for {count} items only; ask for fewer")

    def _draw_unused(
        self, frame: Frame, used: set[frozenset[str]], rng: random.Random
    ) -> Drawn | None:
        for _ in range(MAX_DRAWS):
            drawn = self.draw(frame, rng)
            if drawn is None:
                continue
            content = self.lexicon.content(f"{drawn.context} {drawn.word}", self.own_words)
            if content not in used:
                used.add(content)
                return drawn
        return None


def _answers(text: str) -> list[str]:
    found = ANSWER.search(text)
    if not found:
        raise AtlasError(f"cloze frame '{text}': must end in the missing word, as in [ship,boat]")
    return found[1].split(",")


def write(folder: Path, items: int, seed: int) -> None:
    """Write the data of the cloze task and its lm-eval task."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "cloze.jsonl", islice(Cloze().generate(seed), items))
    about = "Next-word cloze: the word that topic, partner or earlier mention asks for."
    task = choice_task("atlas_cloze", "cloze.jsonl", about, context="context")
    (folder / "cloze.yaml").write_text(task, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.out, args.items, args.seed)
