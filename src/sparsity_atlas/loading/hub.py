"""Repositories of the Hugging Face Hub: fetched at one commit, and checked to be what it names.

A file of the Hub's cache is named by what it must hash to, SHA-256 for large files and git's SHA-1 for
others; that is checked here, because huggingface_hub compares sizes only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sparsity_atlas import cli
from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.files.whole import canonical, file_digest
from sparsity_atlas.loading.contents import select

if TYPE_CHECKING:
    from datasets import DatasetBuilder

TRIES = 5
# Answers that another try may change: timeout, too many requests, failures of the server.
_PASSING = {408, 429, 500, 502, 503, 504}
# Seconds; a server that asks for more patience is told of instead.
_LONGEST_WAIT = 300.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub.

    what: the key of the configuration that names it, for errors.
    revision: commit, tag or branch.
    """

    what: str
    kind: Literal["model", "dataset"]
    name: str
    revision: str = "main"

    def commit(self, *, offline: bool = False) -> str:
        """The commit of the revision; the cache's own record where the Hub cannot be reached.

        Raises:
            AtlasError: the Hub does not give it, and the cache does not know it.
        """
        from huggingface_hub import HfApi

        resolved = self._ask(
            lambda: HfApi().resolve_revision(
                self.name, repo_type=self.kind, revision=self.revision, local_files_only=offline
            )
        )
        return resolved.resolved

    def fetch(
        self,
        patterns: list[str],
        # Other formats and parts of the repository are kept in folders.
        exceptions: Sequence[str] = ("*/*",),
        *,
        offline: bool = False,
    ) -> Path:
        """The files of the repository that match, in the cache; their folder.

        Args:
            patterns: shell patterns of paths, in which * stands for folders, too.
            exceptions: of those that are not wanted all the same.
            offline: use the cache only.

        Raises:
            AtlasError: the Hub does not give them, or not as it names them itself.
        """
        from huggingface_hub import snapshot_download

        folder = Path(
            self._ask(
                lambda: snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=patterns,
                    ignore_patterns=list(exceptions) or None,
                    local_files_only=offline,
                )
            )
        )
        there = (path for path in folder.rglob("*") if path.is_file())
        found = sorted(path.relative_to(folder).as_posix() for path in there)
        for path in select(found, patterns, exceptions):
            self._check(folder / path)
        return folder

    def fetch_file(self, path: str) -> Path:
        """One file of the repository, in the cache.

        Raises:
            AtlasError: the Hub does not give it, or not as it names it itself.
        """
        from huggingface_hub import hf_hub_download

        file = Path(
            self._ask(
                lambda: hf_hub_download(
                    self.name, path, repo_type=self.kind, revision=self.revision
                )
            )
        )
        self._check(file)
        return file

    def fetch_data(self, subset: str | None, **options: Any) -> DatasetBuilder:
        """Bring the files of a data set into the cache, before `datasets` makes its tables of them.

        Args:
            subset: its configuration.
            options: as `datasets.load_dataset` takes them.

        Returns:
            What makes the tables, or finds those of an earlier run.

        Raises:
            AtlasError: the Hub does not give the files, or not as it names them itself, or what the
                cache has is of another commit.
        """
        from datasets import load_dataset_builder

        builder = self._ask(
            lambda: load_dataset_builder(self.name, subset, revision=self.revision, **options)
        )
        # Without the Hub, `datasets` takes the newest that it has, whatever was asked for.
        if builder.hash != self.revision:
            raise AtlasError(f"{self}: the cache has commit {builder.hash} only")
        start = f"hf://datasets/{self.name}@{self.revision}/"
        for files in (builder.config.data_files or {}).values():
            for url in files:
                if url.startswith(start):
                    self.fetch_file(url.removeprefix(start))
        return builder

    def _check(self, path: Path) -> None:
        """Compare a cached file with the hash that names it.

        Raises:
            AtlasError: they differ; the file is removed from the cache.
        """
        if not path.is_symlink():
            cli.logger.info("%s: not checked: the cache's file system has no links", path.name)
            return
        blob = path.parent / path.readlink()
        expected = blob.name
        found = file_digest(blob) if len(expected) == 64 else _git_digest(blob)
        if found != expected:
            blob.unlink()
            path.unlink()
            raise AtlasError(
                f"{self}: {path.name}: its hash is {found}, the Hub names {expected}; "
                "the damaged file was removed from the cache, run again to fetch it anew"
            )

    def _ask(self, call: Callable[[], Result]) -> Result:
        """Call, and call again where the Hub is busy or fails for a while.

        Raises:
            AtlasError: one line that says why there is no answer, and what to do.
        """
        from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

        for attempt in range(1, TRIES + 1):
            try:
                return call()
            # Most errors of huggingface_hub and `datasets` are OSErrors.
            except (OSError, ValueError, RevisionResolutionError) as error:
                answer = next((e for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
                status = answer.response.status_code if answer else None
                wait = _wait(answer, attempt) if status in _PASSING else None
                if wait is None or wait > _LONGEST_WAIT or attempt == TRIES:
                    raise AtlasError(f"{self}: {_reason(self, error, answer)}") from None
                cli.logger.info("%s: the Hub says %s; again in %g s", self, status, wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def __str__(self) -> str:
        return f"{self.what}: {self.name} at {self.revision} on the Hub"


def with_data(config: dict[str, Any]) -> dict[str, Any]:
    """An lm-eval task's configuration whose Hub data set is named by its commit, and in the cache.

    Raises:
        AtlasError: see `Repository.fetch_data`.
        TaskFailure: it is neither here nor can it be on the Hub.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = config.get("dataset_path")
    options = dict(config.get("dataset_kwargs") or {})
    if not isinstance(path, str) or config.get("custom_dataset") or os.path.exists(path):
        return config
    # `json`, `csv` and the like are formats, whose files are local or named by a URL.
    if "/" not in path and {"data_files", "data_dir"} & options.keys():
        return config
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise TaskFailure(
            f"dataset_path: '{path}': no such file or folder, beside the task or in the working "
            "directory, and not the name of a repository of the Hub (`name` or `owner/name`)"
        ) from None
    # An option of a time when data sets had code; lm-eval drops it, too.
    options.pop("trust_remote_code", None)
    revision = options.pop("revision", None) or "main"
    commit = _with_data(path, config.get("dataset_name"), revision, canonical(options))
    return {**config, "dataset_kwargs": {**options, "revision": commit}}


@functools.cache
def _with_data(name: str, subset: str | None, revision: str, options: str) -> str:
    repository = Repository("tasks", "dataset", name, revision)
    repository = replace(repository, revision=repository.commit())
    repository.fetch_data(subset, **json.loads(options))
    return repository.revision


def _git_digest(path: Path) -> str:
    """The name that git gives a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _wait(answer: Any, attempt: int) -> float:
    """Seconds before the next try: what the server asks for, else longer each time."""
    asked = answer.response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else float(2 ** (attempt - 1))


def _reason(repository: Repository, error: Exception, answer: Any) -> str:
    """Why the Hub gave nothing, and what to do. Its own texts are long, and quote the request."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    causes = list(_causes(error))

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if is_a(GatedRepoError):
        return "it is gated; ask for access on its page of the Hub, then `hf auth login` or set HF_TOKEN"
    if is_a(RevisionNotFoundError):
        return "there is no such revision; give a commit, tag or branch of the repository"
    if is_a(RepositoryNotFoundError):
        return (
            f"no such {repository.kind}, or a private one; check its name, or `hf auth login` "
            "(or set HF_TOKEN) with a token that may read it"
        )
    if answer is not None:
        status = answer.response.status_code
        if status in (401, 403):
            return f"access is refused ({status}); check the token (`hf auth whoami`) and its permissions"
        if status == 429:
            asked = answer.response.headers.get("Retry-After")
            return f"too many requests (429); wait {f'{asked} s' if asked else 'a while'} and run again"
        if status >= 500:
            return f"the Hub fails ({status}); run again later"
        return f"the Hub answers {status}"
    if is_a(HFValidationError):
        return "not the name of a repository; expected `name` or `owner/name`"
    if constants.HF_HUB_OFFLINE:
        return "not in the cache (HF_HOME), and HF_HUB_OFFLINE forbids to fetch it"
    if is_a(RevisionResolutionError) or is_a(LocalEntryNotFoundError) or is_a(ConnectionError):
        return "the Hub cannot be reached, and the cache does not have all of it"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
