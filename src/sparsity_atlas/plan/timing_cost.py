"""What the stage `speed` takes: how often it reads how many bytes."""

from __future__ import annotations

from sparsity_atlas.config.timings import Timing

# Bytes a second that a machine reads weights at, at the least, and what a step costs beside.
RATES = {"cpu": 8e9, "cuda": 1.5e12}
STEP_SECONDS = {"cpu": 2e-3, "cuda": 2e-4}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a timing: rounds of steps of whole tokens, and rounds over the maps of some layers with their bytes.
TOKEN_STEPS, MAP_ROUNDS, MAP_BYTES = 320, 24, 6e8
# Beside what is timed: prompts, recording, copies. Of a curve: sparsities, by two thresholds; kinds of maps.
ANOTHER, TIMINGS, KINDS = 2.0, 24, 3
# On a GPU, about: kernels are compiled once, and each timing is recorded.
COMPILING, RECORDING = {"cpu": 0.0, "cuda": 20.0}, {"cpu": 0.0, "cuda": 0.1}
# Seconds of one timing where the fewest steps, or rounds over maps, take less.
LONGEST, FEWEST_STEPS = {"cpu": 5.0, "cuda": 0.7}, {"cpu": 12, "cuda": 48}
LONGEST_MAPS, FEWEST_ROUNDS = {"cpu": 0.5, "cuda": 10.0}, 4


def timing_seconds(timing: Timing, parameters: int) -> float:
    """Seconds of a curve's times, without the start of the stage.

    Args:
        timing: what is asked.
        parameters: of the model.
    """
    rate, beside = RATES[timing.device], STEP_SECONDS[timing.device]
    step = parameters * ITEM_BYTES[timing.dtype] / rate + beside
    token = min(TOKEN_STEPS * step, max(LONGEST[timing.device], FEWEST_STEPS[timing.device] * step))
    # A first round is not timed.
    once, longest = MAP_BYTES / rate + 10 * beside, LONGEST_MAPS[timing.device]
    maps = KINDS * min(MAP_ROUNDS * once, max(longest + once, FEWEST_ROUNDS * once))
    recording = RECORDING[timing.device]
    whole = len(timing.contexts) * (token * ANOTHER + recording)
    each = TIMINGS * (whole + maps + KINDS * recording)
    return COMPILING[timing.device] + len(timing.tokens) * each
