"""A calibration: what a criterion found at every place of a site, in one file.

calibration.safetensors holds the tensors, named {tensor}.{layer}/{name}, and in its metadata under
`about` as JSON what they were found with: model, site, criterion, code, and the text itself.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import canonical, file_digest, write_atomically

if TYPE_CHECKING:
    from sparsity_atlas.criteria.place import State

# Of the tensors that criteria keep: a file of another one is not read.
FORMAT = 2
# Shorter strings turn up in any two texts, and so do shorter passages of longer ones.
SHARED_CHARACTERS, SHARED_PASSAGE = 60, 200
_LONGEST_WORD = 40
# Where a passage may begin: at a word, and at any letter of a script that sets no spaces.
_STARTS = re.compile(r"\b\w|[^\W\x00-\u2e7f]")


@dataclass(frozen=True, eq=False)
class Calibration:
    """The states of all places, by `place.state_name`.

    Attributes:
        states: tensors of each place.
        about: what they were found with.
        digest: of the file.
    """

    states: dict[str, State]
    about: dict[str, Any]
    digest: str

    def identity(self) -> dict[str, Any]:
        """What a node's fingerprint holds of it."""
        return {"digest": self.digest, **{key: self.about[key] for key in ("text", "tokens")}}


def write_calibration(path: Path, states: dict[str, State], about: dict[str, Any]) -> None:
    """Write a calibration atomically; equal content makes equal bytes."""
    from safetensors.torch import save_file

    tensors = {
        f"{place}/{name}": value.cpu().contiguous()
        for place, state in states.items()
        for name, value in state.items()
    }
    # One key: safetensors writes several in no fixed order.
    metadata = {"about": canonical({"format": FORMAT, **about})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_calibration(path: Path, framework: str = "pt") -> Calibration:
    """Read a calibration.

    Args:
        path: the file.
        framework: of the tensors; `np` gives NumPy's arrays, and does without torch.

    Raises:
        AtlasError: it is missing, damaged or of another version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AtlasError(f"{path}: no such file; run its calibration first")
    states: dict[str, State] = defaultdict(dict)
    try:
        with safe_open(path, framework) as file:
            about = json.loads(file.metadata()["about"])
            if about.get("format") != FORMAT:
                raise AtlasError(
                    f"{path}: a calibration of another version of this program; delete it and run again"
                )
            for key in list(file.keys()):
                place, _, name = key.partition("/")
                states[place][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise AtlasError(
            f"{path}: damaged calibration ({error}); delete it and run again"
        ) from None
    return Calibration(dict(states), about, file_digest(path))


def check_disjoint(
    calibration: Calibration, task: str, documents: Iterable[dict[str, Any]]
) -> None:
    """Refuse a task that evaluates what the calibration has seen.

    Args:
        calibration: whose text is looked for.
        task: its name in the configuration.
        documents: that it evaluates.

    Raises:
        AtlasError: a string of a document, 60 characters or longer, lies within the calibration's
            text, or the other way round, or they share a passage of 200 characters.
    """
    seen = _plain(calibration.about["content"])
    passages = _passages(seen)
    for number, document in enumerate(documents):
        for text in map(_plain, _strings(document)):
            if len(text) >= SHARED_CHARACTERS and (
                text in seen or seen in text or not passages.isdisjoint(_passages(text))
            ):
                raise AtlasError(
                    f"tasks.{task}: document {number} is part of the text that the criterion was "
                    f"calibrated on ('{text[:40]}…'); calibrate on another text (capture.text, "
                    "texts.<name>.documents) or leave it out of the task"
                )


def _passages(text: str) -> set[str]:
    """What a shared passage of SHARED_PASSAGE characters has in common from its first whole word on."""
    length = SHARED_PASSAGE - _LONGEST_WORD
    starts = (match.start() for match in _STARTS.finditer(text, 0, max(0, len(text) - length + 1)))
    return {text[start : start + length] for start in starts}


def _plain(text: str) -> str:
    """Without what tokenizers and data sets change in a text."""
    return " ".join(text.split())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
