"""Which curves of a run are timed, and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config
from sparsity_atlas.config.speed_settings import SpeedSettings
from sparsity_atlas.errors import AtlasError

USUAL_TYPES = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True)
class Timing:
    """What is asked of a curve's times; see `SpeedSettings`."""

    device: str
    dtype: str
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, asked: SpeedSettings) -> Timing:
        """As a block says it, with the type that `auto` is."""
        dtype = USUAL_TYPES[asked.device] if asked.dtype == "auto" else asked.dtype
        return cls(asked.device, dtype, tuple(asked.contexts), tuple(asked.tokens))


def timings(config: Config) -> dict[tuple[str, str, str], Timing]:
    """By model, criterion and site, as paths spell it, what is timed; blocks that share a curve are united.

    Raises:
        AtlasError: two of them want another device or type.
    """
    found: dict[tuple[str, str, str], Timing] = {}
    for number, block in enumerate(config.run):
        if block.speed is None:
            continue
        one = Timing.of(block.speed)
        for model in block.models:
            for criterion in block.criteria:
                for site in grid.block_sites(config, block, model):
                    key = (model, criterion, site)
                    found[key] = _united(found.get(key, one), one, number, key)
    return found


def _united(first: Timing, second: Timing, number: int, key: tuple[str, ...]) -> Timing:
    for name in ("device", "dtype"):
        known, wanted = getattr(first, name), getattr(second, name)
        if known != wanted:
            raise AtlasError(
                f"config: run.{number}.speed: {name}: found {wanted}, where another block asks for {known} "
                f"at {'/'.join(key)}; a curve is timed on one device in one type"
            )
    return Timing(
        first.device,
        first.dtype,
        tuple(sorted({*first.contexts, *second.contexts})),
        tuple(sorted({*first.tokens, *second.tokens})),
    )


def timing_slice(config: Config, timing: Timing) -> str:
    """What the stage `speed` depends on beside its model, criterion, site and curve."""
    seen = grid.calibration_tokens(config)
    content = {**asdict(timing), "calibration_tokens": seen}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
