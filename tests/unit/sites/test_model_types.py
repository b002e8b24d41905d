"""The page of model types says what the probes find, for every causal type of transformers."""

from __future__ import annotations

import pytest
import transformers

from checkout import ROOT
from type_survey import NOT_TRIED, SLOW, TYPES, page, read_page, verdict

TEXT = (ROOT / "docs/models.md").read_text(encoding="utf-8")
SAID = read_page(TEXT)
# Of another release, what was found must still be found, and what is new is for the next page.
SAME = f"transformers {transformers.__version__}," in TEXT


@pytest.mark.parametrize("kind", [one for one in TYPES if one not in SLOW])
def test_what_is_found(kind: str) -> None:
    found = verdict(kind).removeprefix("refused: ")
    if SAME or SAID.get(kind, "").startswith(("all", "input")):
        assert SAID[kind] == found, "python tests/type_survey.py > docs/models.md"


def test_the_page_is_read_as_it_is_written() -> None:
    verdicts = {"one": "all eight sites", "two": "refused: no FFN", "three": "all eight sites"}
    assert read_page(page(verdicts)) == {**verdicts, "two": "no FFN"}
    assert set(SAID) >= set(TYPES) or not SAME


def test_every_type_was_tried() -> None:
    assert [kind for kind, said in SAID.items() if said == NOT_TRIED] == []
