"""What is timed of a run block's curves, on which device."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from sparsity_atlas.config.strict import Strict, some, unique


class SpeedSettings(Strict):
    """Times of decoding with what zeros meet left out, on the machine that the job runs on."""

    device: Literal["cpu", "cuda"]
    """Where it is timed, wherever all else runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and vectors; there is no float16 on a CPU. `auto`: bfloat16 on CUDA, float32 on a
    CPU."""
    contexts: Annotated[list[PositiveInt], AfterValidator(unique)] = Field(default=[512])
    """Tokens before the one that is timed, of whole tokens; none: only maps are timed."""
    tokens: Annotated[
        list[Annotated[int, Field(ge=1, le=16)]], AfterValidator(some), AfterValidator(sorted)
    ] = Field(default=[1])
    """Tokens that are decoded together, of a sequence each; 16 at most."""

    @model_validator(mode="after")
    def _has_kernels(self) -> Self:
        if self.device == "cpu" and self.dtype == "float16":
            raise ValueError(
                "dtype: there is no kernel for float16 on a CPU; use bfloat16 or float32"
            )
        return self
