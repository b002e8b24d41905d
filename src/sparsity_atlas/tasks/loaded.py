"""An entry of the configuration's tasks, loaded: what lm-eval takes of it, and what it is known by.

Random numbers stand where lm-eval has them, which seeds once, loads the tasks, and builds their requests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.files.whole import digest
from sparsity_atlas.tasks.boundary import boundary
from sparsity_atlas.tasks.modules import OwnModules

if TYPE_CHECKING:
    from lm_eval.api.task import Task


_MAKING = ("custom_dataset", "process_docs")


@dataclass(frozen=True)
class RandomState:
    """Where the three generators are."""

    python: Any
    numpy: Any
    torch: Any

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def restore(self) -> None:
        """Go on from there."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


def seed_as_lm_eval(seed: int) -> None:
    """Seed Python, NumPy and torch as `lm_eval.simple_evaluate` does before it loads tasks.

    lm-eval's own seeds are 1234, but 0 for Python; another `seed` is that of all, as after `--seed`.
    """
    random.seed(DEFAULT_RANDOM_SEED if seed == DEFAULT_OTHER_SEED else seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class LoadedTask:
    """An entry of the configuration's tasks, ready for lm-eval.

    Attributes:
        name: its key in the configuration.
        lm_eval_name: task or group in lm-eval.
        contents: what `lm_eval.evaluator.evaluate` takes: leaf tasks, groups.
        limit: first so many documents of each leaf, or None.
        cluster: document field that names items made alike, or None.
        identity: JSON-able description of the task and digest of its documents.
        problem: why it cannot be evaluated on any model, or None.
        modules: of its own code.
        drawn: where random numbers stood when it was loaded; its requests go on from there.
        documents: of each leaf those that are evaluated, as they were read.
        unfollowed: its code reads by names that it computes, or asks for what is another at each call, so
            that its identity may lack something.
        allow_code: whether it may run code that the model writes.
        max_gen_toks: tokens that an answer may have; None: as the task says.
        inserted: text put before its prompts, or nothing.
    """

    name: str
    lm_eval_name: str
    contents: dict[str, Any]
    limit: int | None
    cluster: str | None
    identity: dict[str, Any]
    problem: str | None = None
    modules: OwnModules = field(default_factory=OwnModules, repr=False)
    drawn: RandomState = field(default_factory=RandomState.now, repr=False)
    documents: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    unfollowed: bool = False
    allow_code: bool = False
    max_gen_toks: int | None = None
    inserted: str = ""

    @property
    def leaves(self) -> dict[str, Task]:
        """lm-eval's tasks by name; one unless this is a group."""
        leaves: dict[str, Task] = self.contents["tasks"]
        return leaves

    def as_it_is(self) -> LoadedTask:
        """The same task without what is put before its prompts."""
        identity = {key: one for key, one in self.identity.items() if key != "inserted"}
        return replace(self, inserted="", identity=identity)

    def may_change(self, name: str) -> bool:
        """Whether code of a leaf's own reads its documents, and so may change them."""
        leaf = self.leaves[name]
        # What made the documents has done its work.
        read = {key: one for key, one in vars(leaf.config).items() if key not in _MAKING}
        built_in = type(leaf).__module__.startswith("lm_eval.api.")
        return not built_in or any(callable(one) for one in read.values())

    def documents_of(self, name: str) -> list[Any]:
        """A leaf's documents that are evaluated, as they were read."""
        if not self.may_change(name):
            return self.documents[name]
        return [document for _, document in self.leaves[name].doc_iterator(limit=self.limit)]

    def cluster_of(self, document: dict[str, Any]) -> str | None:
        """What names the items that a document was made alike with; None where each is by itself.

        Raises:
            TaskFailure: the document has no such field.
        """
        if self.cluster is None:
            return None
        if self.cluster not in document:
            raise TaskFailure(
                f"cluster: documents have no field '{self.cluster}'; they have {', '.join(document)}"
            )
        return str(document[self.cluster])

    @property
    def data(self) -> dict[str, str]:
        """The commit of each Hub data set that it reads."""
        configs = [leaf.config for leaf in self.leaves.values()]
        options = {config.dataset_path: config.dataset_kwargs or {} for config in configs}
        return {path: one["revision"] for path, one in options.items() if "revision" in one}

    def identity_with(self, prepared: Callable[[], Mapping[str, Task]]) -> dict[str, Any]:
        """The identity, with what its code made of its documents where the code cannot be followed.

        Args:
            prepared: gives the leaves with their requests; asked only where it must be.
        """
        if not self.unfollowed:
            return self.identity
        try:
            leaves = prepared()
        except TaskFailure as failure:
            return {**self.identity, "problem": str(failure)}
        requests = [[repr(one.args) for one in leaf.instances] for leaf in leaves.values()]
        return {**self.identity, "requests": digest(requests)}

    @contextlib.contextmanager
    def code(self, doing: str) -> Iterator[None]:
        """Where code of the task's own may run; see `task_failures.boundary`."""
        with (
            code_allowed(self.allow_code),
            boundary(self.name, doing, self.modules),
            compiled_once(),
        ):
            yield


@contextlib.contextmanager
def code_allowed(allow: bool) -> Iterator[None]:
    """Let the metric `code_eval` of the library `evaluate` do its work, if that was asked for."""
    name, before = "HF_ALLOW_CODE_EVAL", os.environ.get("HF_ALLOW_CODE_EVAL")
    if allow:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if allow:
            os.environ.pop(name)
            os.environ.update({name: before} if before is not None else {})


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Let lm-eval compile a template once, which it does for each document anew."""
    from lm_eval.utils import env

    before = env.from_string
    env.from_string = functools.cache(before)
    try:
        yield
    finally:
        env.from_string = before
