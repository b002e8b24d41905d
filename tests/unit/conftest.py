"""A tiny model that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_lm import save_model, write_model_manifest


@pytest.fixture(scope="session", autouse=True)
def no_inventory() -> Iterator[None]:
    """After each evaluation lm-eval asks pip and compilers for seconds what is installed: not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in Hugging Face format."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def manifest(model_folder: Path) -> Path:
    """Its manifest."""
    return write_model_manifest(model_folder, model_folder.parent / "results" / "model.json")
