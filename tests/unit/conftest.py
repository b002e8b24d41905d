"""A tiny model that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_lm import save_model, write_model_manifest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in Hugging Face format."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def manifest(model_folder: Path) -> Path:
    """Its manifest."""
    return write_model_manifest(model_folder, model_folder.parent / "results" / "model.json")
