"""What Pydantic finds wrong with a configuration, in our words."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(item: ErrorDetails, whole: type[BaseModel] | None = None) -> str:
    """One clause for one finding of Pydantic.

    Args:
        item: the finding.
        whole: the model that was validated, whose keys an unknown one may have meant.
    """
    # Pydantic names the branch of a union in `loc`; the user's key path has no such parts.
    path = ".".join(
        str(part)
        for part in item["loc"]
        if not (
            isinstance(part, str)
            and (part.startswith(("list[", "literal[", "function-")) or part == "[key]")
        )
    )
    if item["type"] == "extra_forbidden":
        *outer, key = item["loc"]
        near = get_close_matches(str(key), _keys(whole, outer) if whole else (), 1)
        return f"{path}: unknown key" + (f" (did you mean '{near[0]}'?)" if near else "")
    if item["type"] == "missing":
        return f"{path}: missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("dict_type", "model_type"):
        message = "a mapping is wanted"
    if item["type"] == "list_type" and path.endswith(".levels"):
        message = "'auto' or a list of levels is wanted"
    if item["type"] == "list_type" and path.endswith(".revisions"):
        message = "a list or a mapping of revisions is wanted"
    message = message[0].lower() + message[1:]
    if item["type"] == "value_error" and not path:
        return message
    found = "" if isinstance(item["input"], dict | list) else f", found {_short(item['input'])}"
    return f"{path}: {message}{found}"


def _keys(whole: type[BaseModel], outer: list[int | str]) -> set[str]:
    """Keys of the mapping that lies behind the keys `outer`; what else these name is no field."""
    kinds = {whole}
    for part in outer:
        fields = [kind.model_fields[str(part)] for kind in kinds if part in kind.model_fields]
        if fields:
            kinds = {kind for field in fields for kind in _models(field.annotation)}
    return {name for kind in kinds for name in kind.model_fields}


def _models(annotation: Any) -> set[type[BaseModel]]:
    """The models that a type names, however deep in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {kind for part in get_args(annotation) for kind in _models(part)}


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
