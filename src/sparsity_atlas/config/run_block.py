"""A block of the selection `run`: which models, criteria, sites, levels and tasks go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from sparsity_atlas.config.speed_settings import SpeedSettings
from sparsity_atlas.config.strict import Strict, some
from sparsity_atlas.spelling import Level
from sparsity_atlas.terms import PartBeside, Site


def _layers_branch(value: Any) -> str:
    several = isinstance(value, list) and any(isinstance(one, list) for one in value)
    return "list[several]" if several else "list[one]"


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("the number of a layer is wanted")
    return value


LayerNumber = Annotated[int, Field(ge=0, le=999_999), BeforeValidator(_no_truth)]
LayerNumbers = Annotated[list[LayerNumber], AfterValidator(some), AfterValidator(sorted)]


class RunBlock(Strict):
    """A part of the grid: every combination of what it lists. Blocks may overlap."""

    models: Annotated[list[str], AfterValidator(some)]
    criteria: Annotated[list[str], AfterValidator(some)] = Field(default=["topp"])
    sites: Annotated[list[Site], AfterValidator(some)] | None = None
    """Unset: the model's own `sites`, else intermediate and input, which every FFN has."""
    parts: Annotated[list[PartBeside], AfterValidator(some)] | None = None
    """Parts of a layer that are sparsified, beside attention; the others stay dense. Paths then say
    `intermediate@experts`. Unset: all. Where a model has no other parts, that is the plain site, and not both
    can be asked for."""
    layers: (
        Annotated[
            Annotated[LayerNumbers, Tag("list[one]")]
            | Annotated[list[LayerNumbers], AfterValidator(some), Tag("list[several]")],
            Discriminator(_layers_branch),
        ]
        | None
    ) = None
    """Layers that are sparsified, by their numbers from 0; the others stay dense. Paths then say
    `intermediate@layers0-3+7`. A list of such lists, as `[[0], [1], [2]]`: each of them by itself, a curve
    each. Unset: all, which can only be said so."""
    by_projection: bool = False
    """Whether each linear map has a mask of its own, also where several read one vector (queries, keys and
    values; gate and up), at input, all_inputs, qkv_input and all_linear_inputs. Paths then say
    `all_linear_inputs@projections`."""
    levels: Annotated[
        Annotated[Literal["auto"], Tag("literal[auto]")]
        | Annotated[list[Level], AfterValidator(some), Tag("list[levels]")],
        # One branch, so that one mistake is told once.
        Discriminator(lambda value: "literal[auto]" if value == "auto" else "list[levels]"),
    ] = "auto"
    """`auto`: searched for; a list: exactly these."""
    sensitivity: Annotated[list[Level], AfterValidator(some)] | None = None
    """Levels at which one layer at a time is sparsified too, to see what each adds to the loss. `levels`
    are the curve's own all the same."""
    tasks: Annotated[list[str], AfterValidator(some)] | None = None
    """Unset: all of the catalogue."""
    speed: SpeedSettings | None = None
    """Measure on this machine what the zeros gain in time: `speed.csv`. Unset: nothing is timed."""
