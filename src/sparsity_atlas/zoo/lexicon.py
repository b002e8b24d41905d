"""The words of the generated tasks, and how a frame becomes a sentence.

A frame is a sentence with slots; pairs.yaml explains the notation, lexicon.yaml holds the words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError

SLOT = re.compile(r"\{([^{}]+)\}")
SWITCH = re.compile(r"<([^<>/]*)/([^<>/]*)>")
# Spelled with a vowel and said without one, or the other way round.
AN_BEFORE = re.compile(r"(?!use|uni|eu|one)[aeiou]|hour|honest|honour|heir", re.IGNORECASE)

Row = dict[str, str]


@dataclass(frozen=True)
class Lexicon:
    """`classes`: per class its rows, form → word. `lemmas`: content word → what it counts as."""

    classes: dict[str, list[Row]]
    lemmas: dict[str, str]

    def content(self, text: str, also: Iterable[str] = ()) -> frozenset[str]:
        """The content words of a text: its words of open classes, inflection undone.

        `also` adds words that stand in no class (a frame's own alternatives).
        """
        extra = set(also)
        words = re.findall(r"[a-z]+", text.lower())
        return frozenset(self.lemmas.get(w, w) for w in words if w in self.lemmas or w in extra)


def read_yaml(name: str) -> dict[str, Any]:
    """A data file that lies beside this module."""
    content: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parent / name).read_text(encoding="utf-8")
    )
    return content


@cache
def load_lexicon() -> Lexicon:
    """The lexicon of this package."""
    return parse_lexicon(read_yaml("lexicon.yaml"))


def parse_lexicon(source: dict[str, Any]) -> Lexicon:
    """Build a lexicon from the structure of lexicon.yaml; AtlasError names a row that is wrong."""
    classes: dict[str, list[Row]] = {}
    lemmas: dict[str, str] = {}
    for name, entry in source.items():
        if "union" in entry:
            classes[name] = [row for part in entry["union"].split() for row in classes[part]]
            continue
        forms = entry["forms"].split()
        closed = set(entry.get("closed", "").split())
        classes[name] = []
        for line in entry["words"].split(","):
            words = line.split()
            if len(words) != len(forms):
                raise AtlasError(f"lexicon {name}: '{line.strip()}' must give the forms {forms}")
            row = dict(zip(forms, words, strict=True))
            classes[name].append(row)
            lemma = next((word for form, word in row.items() if form not in closed), "").lower()
            for form in set(forms) - closed:
                # The first class wins, so that every text is read in the same way.
                lemmas.setdefault(row[form].lower(), lemma)
    return Lexicon(classes, lemmas)


def alternatives(text: str) -> list[str]:
    """The words that a frame lists itself, as in {sailor,captain}."""
    return [w for slot in SLOT.findall(text) if "," in slot for w in slot.lower().split(",")]


def apply_switch(text: str, switch: int) -> str:
    """Keep one side of each <a/b>."""
    return SWITCH.sub(lambda match: match.group(1 + switch), text)


def fill(
    texts: Sequence[str],
    lexicon: Lexicon,
    switch: int,
    rng: random.Random,
    fixed: dict[str, Row] | None = None,
) -> tuple[list[str], dict[str, Row]] | None:
    """Fill the slots of sentences that belong together, one word per slot name.

    `switch` 0 makes nouns singular, 1 plural, where the slot asks for no form; `fixed` gives the
    rows of some slots. Returns the sentences and the rows, or None where two slots drew one word.
    """
    rows = dict(fixed or {})
    number: dict[str, str] = {}
    for slot in (slot for text in texts for slot in SLOT.findall(text)):
        name = slot.partition(".")[0]
        if name not in rows:
            rows[name] = rng.choice(_candidates(name, lexicon))
            number[name] = rng.choice(("sg", "pl"))
    words = [word for row in rows.values() for word in set(row.values())]
    prepositions = {row.get(form) for row in rows.values() for form in ("prep", "wrong")}
    words = [word for word in words if word not in prepositions]
    if len(words) != len(set(words)):
        return None

    def word(match: re.Match[str]) -> str:
        name, _, form = match.group(1).partition(".")
        row = rows[name]
        if form == "any":
            form = number[name]
        elif not form:
            form = ("pl" if switch else "sg") if "sg" in row else next(iter(row))
        if form not in row:
            raise AtlasError(f"frame '{texts[0]}': {{{match.group(1)}}} must be one of {list(row)}")
        return row[form]

    return [tidy(SLOT.sub(word, text)) for text in texts], rows


def _candidates(name: str, lexicon: Lexicon) -> list[Row]:
    if "," in name:
        return [{"base": word} for word in name.split(",")]
    rows = lexicon.classes.get(name.rstrip("0123456789"))
    if rows is None:
        raise AtlasError(f"frame slot {{{name}}}: no such class; there are {list(lexicon.classes)}")
    return rows


def tidy(text: str) -> str:
    """Choose a or an, close the gaps that empty alternatives leave, and begin with a capital."""
    text = " ".join(text.split())
    text = re.sub(r" ([.,?!])", r"\1", text)
    text = re.sub(
        r"\b([Aa])\(n\) (\w+)",
        lambda m: f"{m[1]}{'n' if AN_BEFORE.match(m[2]) else ''} {m[2]}",
        text,
    )
    return text[:1].upper() + text[1:]
