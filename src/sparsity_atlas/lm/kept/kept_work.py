"""A task's requests in batches, arranged by the first process that needs them and kept for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from sparsity_atlas.code_version import code_version
from sparsity_atlas.lm import forest
from sparsity_atlas.lm.kept import batch_file
from sparsity_atlas.lm.work import Limits, Scored, Work, arranged
from sparsity_atlas.models.memory import Largest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.lm.forward import Abilities
    from sparsity_atlas.lm.work import Encoding

# What is kept of `Work` beside its batches.
_KEPT = ("documents", "owners", "windows", "prompts", "lengths", "cut")


class Keep(Protocol):
    """Where what was arranged is kept for other processes, of one task's requests."""

    def read(self, how: dict[str, Any]) -> bytes | None:
        """What was made of them in that way; None: nothing that is whole."""

    def write(self, how: dict[str, Any], content: bytes) -> None:
        """Keep that."""


def arrange_once(
    requests: dict[str, list[Instance]],
    encodings: Callable[[], dict[str, list[Encoding]]],
    limits: Limits,
    abilities: Callable[[list[forest.Request], bool], Abilities],
    *,
    share: bool,
    keep: Keep,
) -> Work:
    """As `work.arrange`, with what is kept, or is kept now: as much as follows without the model.

    Args:
        requests: by kind (lm-eval's request type).
        encodings: gives those of the same; asked only where nothing is kept.
        limits: of the model.
        abilities: finds out by the longest request what the model does right, where rows branch or do not;
            its numbers must not follow other requests.
        share: whether rows may branch, if the model can do it.
        keep: where it is kept.

    Raises:
        TaskFailure: a request that cannot be scored.
    """
    how = {"limits": asdict(limits), "share": share, "code": code_version("lm.kept.kept_work")}
    known = keep.read(how)
    if known is None:
        work, scored = arranged(requests, encodings(), limits, share=share)
        longest = _longest(scored)
        keep.write(how, _written(work, longest))
    else:
        work, longest = _read(known)
    work.abilities = abilities(longest, work.branching)
    if work.branching and not work.abilities.branches:
        return arrange_once(requests, encodings, limits, abilities, share=False, keep=keep)
    return work


def _longest(scored: Scored) -> list[forest.Request]:
    """The first of the longest requests, if there are any."""
    every = [one for some in scored.requests.values() for one in some]
    return [max(every, key=lambda one: len(one.tokens))] if every else []


def _written(work: Work, longest: list[forest.Request]) -> bytes:
    about = {name: getattr(work, name) for name in _KEPT}
    return batch_file.written(
        work.batches, {**about, "largest": asdict(work.largest), "longest": longest}
    )


def _read(content: bytes) -> tuple[Work, list[forest.Request]]:
    batches, about = batch_file.read(content)
    longest = [forest.Request(*one) for one in about.pop("longest")]
    about["documents"] = [(task, document) for task, document in about["documents"]]
    largest = Largest(**about.pop("largest"))
    return Work(**about, largest=largest, batches=batches), longest
