"""The schema for editors is the one that is enforced."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sparsity_atlas.config.documents import json_text, markdown_text
from sparsity_atlas.config.schema import parse

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("path", "text"),
    [("workflow/config/schema.json", json_text()), ("docs/configuration.md", markdown_text())],
)
def test_what_is_generated_is_in_step(path: str, text: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == text, "run: sparsity-atlas schema"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "workflow/config").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_committed_configuration_is_valid(path: Path) -> None:
    base = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    merged = _merge(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    parse(merged)


def _merge(base: object, update: object) -> object:
    """Mappings are merged, everything else is replaced, as Snakemake does it."""
    if isinstance(base, dict) and isinstance(update, dict):
        return {**base, **{key: _merge(base.get(key), value) for key, value in update.items()}}
    return update
