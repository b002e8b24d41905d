"""A training that goes on where it was interrupted, with the same weights as one that was not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import write_atomically


@dataclass(frozen=True)
class State:
    """Where a training keeps itself, every so many steps.

    Attributes:
        path: the file, which goes when the training is over.
        settings: what is trained, as JSON: with others it is another training.
        every: steps.
    """

    path: Path
    settings: dict[str, Any]
    every: int = 1000

    def save(self, step: int, model: Any, optimizer: Any, curve: list[tuple[int, float]]) -> None:
        """Write it whole, or leave the one before."""
        content = {
            "settings": json.dumps(self.settings),
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curve": curve,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: torch.save(content, file))

    def load(self, model: Any, optimizer: Any) -> tuple[int, list[tuple[int, float]]]:
        """Put the kept weights and moments in their places; the steps done and the curve until there.

        Raises:
            AtlasError: it is of another training.
        """
        if not self.path.is_file():
            return 0, []
        content = torch.load(self.path, map_location=model.device, weights_only=True)
        if content["settings"] != json.dumps(self.settings):
            raise AtlasError(
                f"--state: {self.path}: it is of another training; remove it to begin anew"
            )
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return content["step"], content["curve"]
