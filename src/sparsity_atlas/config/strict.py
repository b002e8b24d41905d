"""What every part of the configuration keeps to."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def unique(values: list[Any]) -> list[Any]:
    """A list that names nothing twice.

    Raises:
        ValueError: it does.
    """
    doubles = sorted({str(value) for value in values if values.count(value) > 1})
    if doubles:
        raise ValueError(f"given twice: {', '.join(doubles)}")
    return values


def some(values: list[Any]) -> list[Any]:
    """A list that is neither empty nor names anything twice.

    Raises:
        ValueError: it is, or does.
    """
    if not values:
        raise ValueError("the list is empty")
    return unique(values)


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """A mapping that is not empty.

    Raises:
        ValueError: it is.
    """
    if not values:
        raise ValueError("the mapping is empty")
    return values


class Strict(BaseModel):
    """A part of the configuration: no key but its own, and no `true` where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, about: ValidationInfo) -> Any:
        kind = cls.model_fields[about.field_name or ""].annotation
        if get_origin(kind) is list and isinstance(value, list):
            (kind,) = get_args(kind)
        found = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in found) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("a number is wanted")
        return value
