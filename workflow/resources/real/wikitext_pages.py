"""The pages of a WikiText file, which lm-eval's own `wikitext` gets one by one."""

from __future__ import annotations

import re

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["pages", "process_results", "wikitext_detokenizer"]

# A line with the title of a page; those of its parts have more signs on either side.
TITLE = re.compile(r"^ = [^=\n].*[^=\n] = $", re.MULTILINE)


def pages(whole: Dataset) -> Dataset:
    """A page a row, as `page`, of a data set whose rows hold many."""
    text = "".join(whole["text"])
    starts = [one.start() for one in TITLE.finditer(text)]
    ends = [*starts[1:], len(text)]
    found = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return Dataset.from_list([{"page": page} for page in found])
