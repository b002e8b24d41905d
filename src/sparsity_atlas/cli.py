"""What every stage's command line shares: logging, and errors in one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sparsity_atlas.errors import AtlasError

logger = logging.getLogger("sparsity_atlas")


def run(stage: Callable[[], None]) -> None:
    """Run a stage's `main`; a mistake of the user's ends in one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Progress bars and advice of the libraries would bury our own lines in the log.
    for name in ("transformers", "datasets", "lm_eval", "lm-eval", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        stage()
    except AtlasError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


def optional_path(text: str) -> Path | None:
    """A path, or None for the empty string that an absent input leaves."""
    return Path(text) if text else None


def folder_of(path: Path) -> Path:
    """The folder of an output, made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
