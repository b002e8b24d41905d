"""How names, repositories and levels are spelled: they become folders, and parts of paths."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

# Folders of results/ and results/{model}/ that a catalogue name would collide with, and endings of files.
RESERVED = {"figures", "logs", "benchmarks", "dense", "capture", "metrics", "partial"}
RESERVED |= {"answers", "truthfulness"}
ENDINGS = (
    *(".json", ".jsonl", ".csv", ".yaml", ".html", ".zarr", ".parquet"),
    *(".lock", ".journal", ".log", ".tmp", ".partial"),
)
# What tables say themselves, and what those who read them (pandas, R) take for no value or for a truth.
WORDS = {"average", "na", "nan", "n.a", "null", "none", "true", "false", "inf", "infinity"}
# A folder's name may have 255 bytes, and a temporary file's is longer than its own.
_LONGEST = 100


def check_name(value: str) -> str:
    """A name of the catalogues, as it is.

    Raises:
        ValueError: it cannot be a folder's name, or would be read as something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or ".." in value:
        raise ValueError(
            "names are letters, digits, '.', '_' and '-', and begin with one of the first two"
        )
    if len(value) > _LONGEST:
        raise ValueError(f"a name of {len(value)} characters; at most {_LONGEST} are allowed")
    # Some file systems do not tell capitals from small letters.
    if value.lower() in RESERVED:
        raise ValueError(f"'{value}' is the name of a folder of the results")
    if value.lower() in WORDS or _is_number(value):
        raise ValueError(f"'{value}' would be read from a table as something else than a name")
    if value.lower().endswith(ENDINGS):
        raise ValueError(f"'{value}' ends like a file of the results")
    return value


def _revision_name(value: Any) -> Any:
    """The end of a model's name: numbers of steps are written without quotes, too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _end_of_a_name(value: str) -> str:
    # What a name may be, the model's name before it decides.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(
            "it ends a model's name: letters, digits, '.', '_' and '-', the first one of the first two; "
            "give it a key of its own, as in `revisions: {early: {revision: ...}}`"
        )
    return value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _repository(value: str) -> str:
    if not re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", value, re.ASCII) or ".." in value:
        raise ValueError("a repository of the Hub is `name` or `owner/name`")
    return value


def _revision(value: str) -> str:
    # It becomes a path in the Hub's cache.
    if not re.fullmatch(r"\w[\w./-]*", value, re.ASCII) or ".." in value:
        raise ValueError("a revision is a commit, tag or branch")
    return value


# A level is spelled out in a path: 1e999999 would be a name of a million digits.
_LARGEST_EXPONENT = 39
_MOST_DECIMALS = 60


def canonical_level(value: Any) -> str:
    """Spell a level as in paths: the shortest decimal (0.9 for 0.90, 1 for 1.0), no exponent.

    Raises:
        ValueError: `value` is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("a level is a number, such as 0.9")
    try:
        # repr of a float is its shortest decimal; Decimal(0.1) would be its binary expansion.
        number = Decimal(repr(value) if isinstance(value, float) else str(value))
    # A ValueError: an integer of more digits than Python writes out.
    except (ArithmeticError, ValueError):
        raise ValueError("a level is a number, such as 0.9") from None
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):  # a letter: NaN or an infinity
        raise ValueError("a level is a finite number")
    if number.adjusted() > _LARGEST_EXPONENT or exponent < -_MOST_DECIMALS:
        raise ValueError("a level has at most 40 digits before the point and 60 after it")
    text = format(number.normalize(), "f")
    return "0" if text in ("-0", "0") else text


Name = Annotated[str, AfterValidator(check_name)]
Repository = Annotated[str, AfterValidator(_repository)]
Revision = Annotated[str, AfterValidator(_revision)]
RevisionName = Annotated[
    str,
    BeforeValidator(_revision_name),
    AfterValidator(_end_of_a_name),
    WithJsonSchema({"type": ["integer", "string"]}),
]
Level = Annotated[
    str, BeforeValidator(canonical_level), WithJsonSchema({"type": ["number", "string"]})
]
