"""Tasks whose prompts have tokens put before them, and are those of another entry in all else."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sparsity_atlas.config.strict import Strict


class InsertedText(Strict):
    """A text put before the prompts of a task, such as "/ " forty times (arXiv 2510.01032).

    In a chat it begins the first message of the user, behind the system's; else it stands before the prompt,
    behind BOS. Texts that are scored whole have it before their first token. What is scored is the same.
    """

    before: str
    """Entry of `tasks` whose prompts these are. All else of this entry is that one's."""
    text: str = Field(default="/ ", min_length=1)
    """What is put there."""
    times: int = Field(default=1, gt=0)
    """How often, one behind the other."""


def resolved(tasks: dict[str, Any]) -> dict[str, Any]:
    """Entries of which those with `inserted` have all other keys of the entry that they name.

    Args:
        tasks: entries as they are written down, or as a parsed configuration writes them.

    Raises:
        ValueError: an entry that is not there, has an insertion of its own, or says otherwise.
    """
    found = {}
    for name, entry in tasks.items():
        inserted = entry.get("inserted") if isinstance(entry, dict) else None
        if not isinstance(inserted, dict) or not isinstance(inserted.get("before"), str):
            found[name] = entry
            continue
        before = inserted["before"]
        base = tasks.get(before)
        if not isinstance(base, dict):
            known = ", ".join(one for one in tasks if one != name) or "none"
            raise ValueError(f"tasks.{name}: inserted: before: unknown '{before}'; known: {known}")
        if base.get("inserted") is not None:
            raise ValueError(
                f"tasks.{name}: inserted: before: '{before}' has a text inserted itself; name the task "
                "that it is inserted into"
            )
        whole = {**base, "task": base.get("task") or before}
        for key, value in entry.items():
            if key != "inserted" and value != whole.get(key):
                raise ValueError(
                    f"tasks.{name}: {key}: what is not `inserted` is that of '{before}'; leave it out"
                )
        found[name] = {**whole, "inserted": inserted}
    return found
