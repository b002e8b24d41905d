"""Stage `node`: `evaluate` in a worker, whose work it does itself where it must."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sparsity_atlas.evaluation.worker.client import ask, wanted


def main() -> None:
    """Command line: as of `evaluate`; `--serve` is for the workers themselves."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--settings", type=json.loads)
    known, _ = parser.parse_known_args()
    if known.serve is not None:
        from sparsity_atlas.evaluation.worker.server import serve

        serve(known.serve)
    elif known.model is not None and known.settings is not None and wanted():
        ask(sys.argv[1:], known.model, known.settings)
    else:
        from sparsity_atlas.evaluation.evaluate import main as evaluate

        evaluate(sys.argv[1:])
