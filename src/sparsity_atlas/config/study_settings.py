"""What is measured beside the curves only if it is asked for: the key `studies`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from sparsity_atlas.config.strict import Strict, some
from sparsity_atlas.spelling import canonical_level
from sparsity_atlas.terms import well_spelled


def _node(value: str) -> str:
    parts = value.split("/")
    if len(parts) != 3 or not well_spelled(parts[1]):
        raise ValueError("a node is criterion/site/level, such as topp/intermediate/0.9")
    return "/".join([*parts[:2], canonical_level(parts[2])])


NodePath = Annotated[str, AfterValidator(_node)]
# Of terms.STORED, and the stream between the layers.
LastTensor = Literal["residual", "qkv_input", "o_input", "input", "up", "gate", "intermediate"]


class TruthfulnessSettings(Strict):
    """What tells right answers of a model's own from wrong ones."""

    tasks: Annotated[list[str], AfterValidator(some)]
    """Tasks with options or with written answers, of those that run blocks ask of the models."""
    models: Annotated[list[str], AfterValidator(some)] | None = None
    """Unset: all of the run that have the task."""
    tensors: Annotated[list[LastTensor], AfterValidator(some)] = Field(
        default=["residual", "input"]
    )
    """Vectors of an answer's last token: `residual`, what a layer hands on to the next one, or a site's
    tensor."""
    neighbours: int = Field(default=20, ge=4)
    """Nearest answers that the local intrinsic dimension is estimated from; GeoMLE takes half to twice as
    many. Four times as many different answers and two are needed."""
    samples: int = Field(default=2000, ge=20)
    """Answers of a task at most, evenly spread over its documents. All pairs of them are looked at."""
    nodes: Annotated[list[NodePath], AfterValidator(some)] = Field(default_factory=list)
    """Nodes whose induced sparsity in each sample is tried, too, as criterion/site/level. Those that no run
    block has are evaluated for it."""


class StudySettings(Strict):
    """What is measured of the captured activations only if it is asked for, since it takes its time."""

    predictors: Annotated[list[PositiveInt], AfterValidator(some)] | None = None
    """Ranks of predictors of masks from the FFN's input, of every curve at `up`, `gate` or `intermediate`:
    recall and predicted sparsity, in `masks.csv`. Each level takes a pass through the FFNs for each rank,
    and four more."""
    cett: Annotated[list[PositiveFloat], AfterValidator(some)] | None = None
    """Thresholds of the norm of what a neuron adds to the FFN's output, of every curve at `intermediate`:
    CETT and the share below, in `masks.csv`. Each takes a third of a pass through the FFNs."""
    coactivation: int | None = Field(default=None, ge=2)
    """Neurons of each layer that are drawn to count which are kept together, of every curve: in
    `masks.csv`."""
    prompt_reuse: Annotated[list[Literal["given", "generated"]], AfterValidator(some)] | None = None
    """What is measured of masks that a prompt leaves for what follows it, of every curve of `prompt_mask` and
    `tda`, in `prompt_reuse.csv`: behind the first part of each captured sequence the text as it goes on
    (`given`), or as the model writes it (`generated`). Each takes two passes of the model over the captured
    text, and three for each level."""
    lid: int | None = Field(default=None, ge=400)
    """Captured tokens among which the local intrinsic dimension is estimated, in `metrics.csv`."""
    truthfulness: TruthfulnessSettings | None = None
    """Whether local intrinsic dimension, induced sparsity or confidence tell right answers: in
    `truthfulness.csv`. Each task is run once more, and its answers with their prompts."""
