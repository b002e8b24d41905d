"""What Pydantic finds wrong with a configuration, in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(item: ErrorDetails) -> str:
    """One clause for one finding of Pydantic."""
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
        return f"{path}: unknown key"
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


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
