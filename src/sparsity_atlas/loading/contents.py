"""Which files of a model's folder are read when it is loaded, at any depth.

A tokenizer or a repository's own code may read a file of any name, so these are all but what is known not
to be read: other formats of weights, documents, a training's state, unless that code names one. The same
patterns say what is fetched from the Hub, and what a model's digest is made of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import file_digest

TEMPLATES = "additional_chat_templates/*.jinja"
CODE = "*.py"
# Shell patterns of paths in the folder; * stands for any number of folders, too.
NOT_READ = (
    # Hidden files, among them those of git and of the Hub's client; what Python compiled.
    *(".*", "*/.*", "__pycache__/*", "*/__pycache__/*"),
    # Weights; those that are used are listed apart.
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf"),
    *("*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.pte", "*.mlmodel", "*.nemo"),
    *("*.npz", "*.npy", "*.pkl", "*.pickle", "*.distcp", "*.engine", "*.tar", "*.tar.*", "*.zip"),
    # Documents.
    *("README*", "*/README*", "LICENSE*", "*/LICENSE*", "NOTICE*", "*.md", "*.rst", "*.pdf"),
    *("*.html", "*.ipynb", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4"),
    *("*.log", "*.csv", "*.parquet", "*.arrow"),
    # A training's state.
    *("trainer_state.json", "*/trainer_state.json", "*tfevents*", "checkpoint-*/*", "runs/*"),
    *("wandb/*", "global_step*/*"),
)
# Files that hold a JSON object, whoever made them.
_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# Weights by the names that transformers gives them: code that speaks of them does not read them.
WEIGHTS = (
    *("*model*.safetensors", "*model*.bin", "tf_model.h5", "flax_model.msgpack", "consolidated.*"),
    *("adapter_model.*", "*.index.json"),
)
_TEXT = re.compile(r"[\"']([^\"'\n]+)[\"']")
LFS_START = b"version https://git-lfs"


def patterns(*, code: bool) -> list[tuple[list[str], list[str]]]:
    """What is read, as pairs of patterns of the files that are wanted and of exceptions.

    Args:
        code: whether the folder's Python is run, which then may read files of its sub-folders.
    """
    if code:
        return [(["*"], list(NOT_READ))]
    return [(["*"], [*NOT_READ, CODE, "*/*"]), ([TEMPLATES], [])]


def select(paths: Iterable[str], wanted: Sequence[str], exceptions: Sequence[str]) -> list[str]:
    """The paths that match `wanted` and none of `exceptions`, as the Hub's client matches them."""
    return [path for path in paths if _matches(path, wanted) and not _matches(path, exceptions)]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def files_read(folder: Path, *, code: bool) -> list[str]:
    """Paths below `folder` of the files that are read beside the weights; see `patterns`."""
    paths = list(_below(folder) if code else _beside(folder))
    found = {one for pair in patterns(code=code) for one in select(paths, *pair)}
    if code:
        named = named_by_code(folder)
        found |= {one for one in paths if os.path.basename(one) in named}
    return sorted(found)


def named_by_code(folder: Path) -> set[str]:
    """Names in a folder's Python of files that are not read as a rule, such as a table in `words.npz`."""
    code = [path for path in _below(folder) if path.endswith(".py")]
    sources = ((folder / path).read_text(encoding="utf-8", errors="replace") for path in code)
    texts = {os.path.basename(text) for source in sources for text in _TEXT.findall(source)}
    names = (text for text in texts if "." in text.strip(".") and not set("*?[") & set(text))
    return {one for one in select(names, NOT_READ, WEIGHTS) if not one.startswith(".")}


def _beside(folder: Path) -> list[str]:
    """Files in the folder, and in that of the chat templates."""
    templates = folder / os.path.dirname(TEMPLATES)
    inside = templates.iterdir() if templates.is_dir() else ()
    return [
        path.relative_to(folder).as_posix()
        for path in (*folder.iterdir(), *inside)
        if path.is_file()
    ]


def _below(folder: Path) -> Iterable[str]:
    """Files at any depth, also through links; a folder that contains itself is entered once."""
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                yield path.relative_to(folder).as_posix()


def files_digest(folder: Path, *, code: bool) -> dict[str, str]:
    """Digests of the files that are read, by their paths; see `files_read`."""
    return {name: file_digest(folder / name) for name in files_read(folder, code=code)}


def small_fault(folder: Path) -> str | None:
    """Which of the small files of a model's folder cannot be read as what its name says; None if all can."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in (".json", ".jinja"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else {}
        except (ValueError, RecursionError) as error:
            return f"{path.name}: {error}"
        if path.name in _OBJECTS and not isinstance(content, dict):
            return f"{path.name}: expected a JSON object, found {type(content).__name__}"
    return None


def check_links(folder: Path) -> None:
    """Refuse a folder with a link to a file that is not there, as a copy of the Hub's cache has them.

    Raises:
        AtlasError: names the link.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise AtlasError(f"{path}: a link to {os.readlink(path)}, which is not there")


def check_fetched(paths: Iterable[Path]) -> None:
    """Refuse what git left in place of a file that it did not fetch.

    Raises:
        AtlasError: names the first of these.
    """
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(LFS_START)) == LFS_START:
                raise AtlasError(
                    f"{path}: it is a git-lfs pointer, not the file; run `git lfs pull` in its folder"
                )


def speaks_of_experts(folder: Path) -> bool:
    """Whether a model's configuration has a word of experts, as that of every mixture of transformers has.

    Some dense models' have it, too, from a family that has both.
    """
    return "expert" in _configuration(folder)


def speaks_of_masks(folder: Path) -> bool:
    """Whether a model's configuration has a word of masks that it fills in, or says that it is not causal."""
    text = _configuration(folder)
    return "mask_token" in text or "is_causal" in text


def _configuration(folder: Path) -> str:
    """The text of a configuration; empty if there is none."""
    path = folder / "config.json"
    return path.read_text(encoding="utf-8", errors="replace").lower() if path.is_file() else ""
