"""Whether a tokenizer gives a text back, and names only tokens that the model has.

A tokenizer may change a text on purpose: lower case, spaces that it folds or puts first, characters that its
vocabulary has not. That is said and recorded. What its vocabulary could say and it loses all the same
(spaces, most often, where a class of transformers puts its own pre-tokenizer in place of the file's) or
what it adds to a text is a fault, and makes every score meaningless.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.bos import put_around

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTENCES = (
    "The old cat sees 3 birds, and 1270 more.",
    "  two  at the beginning and  two inside",
    "a line\n\nand another\twith a tab in it",
    "def first(x):\n    return {'a': x[0] != 1}\n",
    "d\u00e9j\u00e0 vu in \u6771\u4eac, \u041f\u0440\u0438\u0432\u0435\u0442",
    "thanks \U0001f642 for 5 \u20ac",
)
SPACES = (
    " ",
    "\u2581",
    "\u0120",
)  # a space as it is, and as SentencePiece and byte-level BPE write it
OTHER_TOKENS = "other tokens than those of {} by itself"
# Characters and tokens that a message quotes.
SHOWN = 5


@dataclass
class Changes:
    """What becomes of texts between encoding and decoding.

    Attributes:
        faults: what no tokenizer does on purpose.
        notes: what one may do on purpose.
        ids: of each sentence.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


def embedding_rows(model: PreTrainedModel) -> int | None:
    """How many tokens a model's embedding has; None where it cannot be told."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a model of its own code, under names of its own
        return None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[0]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int | None
) -> list[str]:
    """Refuse a tokenizer that breaks texts, or does not belong to the model.

    Args:
        tokenizer: as it was loaded.
        folder: where its files are.
        rows: of the model's embedding, if known.

    Returns:
        What it changes in a text on purpose, for people and the manifest.

    Raises:
        AtlasError: says what is lost or added, or which token has no row.
    """
    where = f"{folder}: tokenizer ({type(tokenizer).__name__})"
    try:
        vocabulary = {_text(token): number for token, number in tokenizer.get_vocab().items()}
        unknown = _unknown(tokenizer)
        found = _changes(
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
            vocabulary,
            unknown,
        )
        found.notes += _around(tokenizer)
    except Exception as error:  # noqa: BLE001 (a tokenizer's own code may raise anything)
        raise AtlasError(f"{where}: it fails: {type(error).__name__}: {error}") from None
    beyond = _check_ids(where, tokenizer, vocabulary, found.ids, rows)
    file = _of_file(folder / "tokenizer.json", vocabulary, unknown)
    differs = file is not None and file.ids != found.ids
    if found.faults:
        others = (
            f", and breaks {len(found.faults) - 1} other texts" if len(found.faults) > 1 else ""
        )
        advice = "; a folder with one that works can be named by `tokenizer` in the model's entry"
        if file is not None and differs and not file.faults:
            advice = (
                "; tokenizer.json by itself does not: transformers replaces a part of it, unless "
                "tokenizer_config.json says tokenizer_class: TokenizersBackend"
            )
        raise AtlasError(f"{where}: {found.faults[0]}{others}{advice}")
    if differs:
        found.notes.append(OTHER_TOKENS.format("tokenizer.json"))
    elif file is None and _differs_from_pieces(folder / "tokenizer.model", tokenizer, found.ids):
        found.notes.append(OTHER_TOKENS.format("tokenizer.model"))
    return [*found.notes, *beyond]


def _unknown(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token for what is unknown; it may stand in tokenizer.json alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own: str | None = tokenizer.unk_token
    if own is not None or backend is None:
        return own
    model = json.loads(backend.to_str())["model"]
    number = model.get("unk_id")
    own = model.get("unk_token") if number is None else model["vocab"][number][0]
    return own


def _around(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer puts around a text beside one BOS, which an evaluation and a capture know."""
    before, behind = put_around(tokenizer)
    shown = [
        _quoted([str(tokenizer.convert_ids_to_tokens(number)) for number in one])
        for one in (before, behind)
    ]
    notes = []
    if before not in ([], [tokenizer.bos_token_id]):
        notes.append(f"{shown[0]} before a text; captured texts begin without")
    if behind:
        notes.append(
            f"{shown[1]} behind a text, and so behind the context of a request, as in lm-eval"
        )
    return notes


def _differs_from_pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]
) -> bool:
    """Whether a SentencePiece model cuts the sentences elsewhere; its ids may be others on purpose."""
    if not path.is_file():
        return False
    from sentencepiece import SentencePieceProcessor

    try:
        plain = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        return False  # of this name are also files of tiktoken's
    pieces = [plain.encode(text, out_type=str) for text in SENTENCES]
    known = [[p for p in one if not plain.is_unknown(plain.piece_to_id(p))] for one in pieces]
    tokens = [tokenizer.convert_ids_to_tokens(one) for one in ids]
    return known != [[one for one in row if one != tokenizer.unk_token] for row in tokens]


def _of_file(path: Path, vocabulary: dict[str, int], unknown: str | None) -> Changes | None:
    """What tokenizer.json does without transformers; None if there is none."""
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        plain = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises no other class)
        raise AtlasError(f"{path}: not a tokenizer: {error}") from None
    plain.no_truncation()
    return _changes(
        lambda text: plain.encode(text, add_special_tokens=False).ids,
        lambda ids: plain.decode(ids, skip_special_tokens=False),
        vocabulary,
        unknown,
    )


def _changes(
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    vocabulary: dict[str, int],
    unknown: str | None,
) -> Changes:
    found = Changes()
    alphabet = _Alphabet(vocabulary)
    for text in SENTENCES:
        ids = list(encode(text))
        found.ids.append(ids)
        back = decode(ids)
        has_unknown = unknown is not None and vocabulary.get(unknown) in ids
        if unknown is not None and has_unknown:
            back = back.replace(unknown, "")
        if back != text:
            _compare(text, back, alphabet, has_unknown, found)
    found.faults = list(dict.fromkeys(found.faults))
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _compare(text: str, back: str, alphabet: _Alphabet, has_unknown: bool, into: Changes) -> None:
    """Sort the differences of a text and what came back into faults and notes."""
    wanted, given = Counter(_letters(text)), Counter(_letters(back))
    if given - wanted:
        signs = sorted(set(back) - set(text)) or sorted(given - wanted)
        into.faults.append(f"it adds {_quoted(signs)} to '{text.strip()}'")
        return
    lost = sorted(wanted - given)
    # A letter is known in all its forms of this text, or it may have been lost in one that is not.
    forms = {sign: [raw for raw in text if sign in _letters(raw)] for sign in lost}
    known = [sign for sign in lost if all(raw in alphabet for raw in forms[sign])]
    if known and not has_unknown:
        into.faults.append(f"it loses {_quoted(known)} of '{text.strip()}'")
        return
    if lost:
        into.notes.append("characters that its vocabulary has not")
        joined = [] if len(back.split()) > 1 else [" "]
    else:
        left = _gaps(back)
        joined = [space for place, space in _gaps(text).items() if place not in left]
    if any(sign in alphabet for space in joined for sign in space):
        into.faults.append(f"it loses the spaces of '{text.strip()}'")
    elif joined:
        into.notes.append("spaces or ends of lines that its vocabulary has not")
    elif not lost:
        into.notes.append(_kind(text, back))


def _kind(text: str, back: str) -> str:
    """What a tokenizer did to a text of which it gave back all letters and words, in a way."""
    if text.strip() == back.strip():
        return "spaces at the beginning or the end"
    if text.split() == back.split():
        return "spaces that follow each other"
    if "".join(text.split()) == "".join(back.split()):
        return "spaces around punctuation"
    if back == back.lower() and text != text.lower():
        return "lower case"
    return "other forms of letters"


def _text(token: str | bytes) -> str:
    """A token of a vocabulary; some repositories' own tokenizers have bytes."""
    return token.decode(errors="replace") if isinstance(token, bytes) else token


class _Alphabet:
    """Which characters a vocabulary can say."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._vocabulary = vocabulary
        bytes_ = set(bytes_to_unicode().values())
        # Every byte, as byte-level BPE spells it, or as SentencePiece does.
        self._all = bytes_ <= vocabulary.keys() or "<0x0A>" in vocabulary
        self._space = any(token.startswith(SPACES) for token in vocabulary)
        self._line = any("\n" in token for token in vocabulary)

    def __contains__(self, sign: str) -> bool:
        own = {" ": self._space, "\n": self._line}
        return self._all or own.get(sign, sign in self._vocabulary)


def _letters(text: str) -> str:
    """A text without spaces and what else tokenizers normalise: case, accents, forms of letters."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(sign for sign in plain if not (unicodedata.combining(sign) or sign.isspace()))


def _gaps(text: str) -> dict[int, str]:
    """The spaces between words, by the number of letters before them."""
    return {
        len(_letters(text[: gap.start()])): gap.group()
        for gap in re.finditer(r"(?<=[A-Za-z0-9])\s+(?=[A-Za-z0-9])", text)
    }


def _quoted(signs: list[str]) -> str:
    more = ", ..." if len(signs) > SHOWN else ""
    return ", ".join(f"'{sign}'" for sign in signs[:SHOWN]) + more


def _check_ids(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: dict[str, int],
    ids: list[list[int]],
    rows: int | None,
) -> list[str]:
    """See that every token that a text may become has a row in the embedding.

    Returns:
        A note where only special tokens have none that no text of ours becomes.

    Raises:
        AtlasError: names the first that has none.
    """
    if rows is None:
        return []
    largest = max((max(one) for one in ids if one), default=0)
    beyond = {token: number for token, number in vocabulary.items() if number >= rows}
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    wrong = sorted(
        (number, token)
        for token, number in beyond.items()
        if token not in special or token in used or number <= largest
    )
    if wrong:
        number, token = wrong[0]
        others = f", and {len(wrong) - 1} more have none" if len(wrong) > 1 else ""
        raise AtlasError(
            f"{where}: token '{token}' has id {number}, but the model's embedding has {rows} rows"
            f"{others}: this tokenizer is of another model, or tokens were added to it alone"
        )
    if largest >= rows:
        raise AtlasError(
            f"{where}: it gives id {largest}, but the model's embedding has {rows} rows"
        )
    return [f"{len(beyond)} special tokens without a row in the embedding"] if beyond else []
