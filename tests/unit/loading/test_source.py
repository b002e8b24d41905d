"""Where a model's files are said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.source import resolve


def test_a_path_that_is_no_folder_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"^models: .*nowhere: no such folder$"):
        resolve({"path": str(tmp_path / "nowhere")})
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(AtlasError, match=r"model\.gguf: a file; name its folder, and a GGUF file "):
        resolve({"path": str(file)})
