"""What a criterion's constants and its configuration say of routed experts, known before a model is loaded.

Keys beside a calibrated rule, which say whose rows are calibrated together:

calibration   `per_layer`: one state for the rows of all experts of a layer, as they come; `per_expert`: one
              for each expert that has enough of them, the layer's for the others
expert_rows   how many are enough
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsity_atlas.criteria import dense_prompt
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import CALIBRATIONS

KEYS = ("calibration", "expert_rows")


def check_keys(name: str, spec: dict[str, Any], calibrated: bool) -> None:
    """Check them as a configuration has them.

    Args:
        name: how messages call the criterion.
        spec: its configuration.
        calibrated: whether the rule is.

    Raises:
        AtlasError: a key that means nothing there, or a value that it cannot have.
    """
    for key in KEYS:
        if key in spec and not calibrated:
            raise AtlasError(f"{name}: {key}: this rule is not calibrated")
    how, rows = spec.get("calibration", CALIBRATIONS[0]), spec.get("expert_rows")
    if how not in CALIBRATIONS:
        raise AtlasError(
            f"{name}: calibration: expected {' or '.join(CALIBRATIONS)}, found {how!r}"
        )
    if rows is None:
        return
    if how != "per_expert":
        raise AtlasError(f"{name}: expert_rows: needs calibration: per_expert")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise AtlasError(
            f"{name}: expert_rows: expected a whole number of at least 1, found {rows!r}"
        )


def why_not(constants: Mapping[str, Any], spec: Mapping[str, Any]) -> str | None:
    """Why a rule cannot work inside routed experts; None: nothing that is known beforehand.

    Args:
        constants: not_in_experts and by_channel, as the rule's class has them.
        spec: its configuration.
    """
    if constants["not_in_experts"]:
        return str(constants["not_in_experts"])
    if constants["by_channel"] and spec.get("calibration") != "per_expert":
        return (
            "what it finds is by channel, which no two experts share; say calibration: per_expert"
        )
    if any(key in spec for key in dense_prompt.KEYS):
        return "what stays dense of a prompt are tokens, of which an expert sees some"
    if spec.get("allocation", "uniform") != "uniform":
        return "an allocation levels one error a layer, and the parts of a mixture's layer have one each"
    return None
