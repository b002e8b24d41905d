"""What a training does beside its recipe: begin with a checkpoint, penalise, cut what is small."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.rectified import FATRELU, THRESHOLD
from sparsity_atlas.zoo.recipe import Architecture, MaskedDiffusion, Mixture, Training
from sparsity_atlas.zoo.sparse.penalty import Stages


@dataclass(frozen=True)
class Course:
    """Of one training; by itself there is nothing of it.

    Attributes:
        base: folder of the checkpoint that it begins with.
        l1: weight of the L1 penalty on what the down projections read.
        fatrelu: the threshold that stands in the ReLU's place when it ends.
        checkpoints: steps after which it is kept as it is then, too.
    """

    base: Path | None = None
    l1: Stages | None = None
    fatrelu: float | None = None
    checkpoints: tuple[int, ...] = ()

    def check(self, shape: Architecture, training: Training) -> None:
        """Refuse what does not go together.

        Raises:
            AtlasError: names the option.
        """
        if self.l1 is not None and isinstance(shape, Mixture | MaskedDiffusion):
            raise AtlasError("--l1: expected a dense causal model")
        if self.fatrelu is not None and shape.activation != "relu":
            raise AtlasError(
                f"--fatrelu: it takes the place of relu, found the activation {shape.activation}"
            )
        if self.fatrelu is not None and not 0 <= self.fatrelu < float("inf"):
            raise AtlasError(f"--fatrelu: found {self.fatrelu}, expected a threshold from 0")
        for step in self.checkpoints:
            if not 0 < step < training.steps:
                raise AtlasError(
                    f"--checkpoints: found {step}, expected steps between 0 and {training.steps}"
                )

    def facts(self) -> dict[str, Any]:
        """For `training.json`: nothing of what there is not."""
        return {
            **({} if self.base is None else {"from": base_name(self.base)}),
            **({} if self.l1 is None else {"l1": [list(point) for point in self.l1.points]}),
            **({} if self.fatrelu is None else {"fatrelu": self.fatrelu}),
        }


def base_name(folder: Path) -> str:
    """What a checkpoint is called: by its `training.json`, else as its folder."""
    path = folder / "training.json"
    if not path.is_file():
        return folder.name
    name: str = json.loads(path.read_text(encoding="utf-8"))["name"]
    return name


def begin_with(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of a checkpoint, whatever its nonlinearity is.

    Raises:
        AtlasError: there are none, or they are of another shape.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise AtlasError(f"--from: {path}: no such file, expected the folder of a zoo model")
    weights = load_file(path)
    own = dict(model.named_parameters())  # without what is tied
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise AtlasError(f"--from: {folder}: its weights are of another shape: {wrong[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def cut_small(model: PreTrainedModel, threshold: float) -> None:
    """Have a model's configuration say FATReLU; it is one when it is loaded again."""
    model.config.hidden_act = FATRELU
    setattr(model.config, THRESHOLD, threshold)
