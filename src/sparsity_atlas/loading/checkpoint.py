"""A model's files on this machine: which they are, whether they may be used, and their digest.

Weights are safetensors. A pickle runs code when it is loaded, and so does a repository's own Python; either
is used only where the model's entry of the configuration says so.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import digest, file_digest, read_json
from sparsity_atlas.loading.adapter import ADAPTER, adapter_digest, adapter_files
from sparsity_atlas.loading.contents import check_fetched, check_links, files_digest, files_read
from sparsity_atlas.loading.gguf_file import check_gguf
from sparsity_atlas.loading.layouts import layout_in
from sparsity_atlas.loading.quantised import check_quantised, method_of

SAFE_FILE = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# Types of numbers that need no scale, as safetensors names them, and as config.json does.
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder and what may be done with it.

    trust_remote_code: whether the Python that it brings may run; never that of a layout which is loaded as a
        class of transformers (see `layouts`).
    code_revision: commit of the other repository that the model's code is in, if it is in another.
    tokenizer: folder of its tokenizer, if that is another.
    adapter: folder of a PEFT adapter that is merged into it.
    adapter_revision: commit of the adapter's repository, if it is on the Hub.
    gguf: name of the file in the folder that holds all of the model, in that format.
    dequantise: whether quantised weights are turned into plain numbers; else they run packed, if they can.
    """

    folder: Path
    trust_remote_code: bool = False
    allow_pickle: bool = False
    code_revision: str | None = None
    tokenizer: Path | None = None
    adapter: Path | None = None
    adapter_revision: str | None = None
    gguf: str | None = None
    dequantise: bool = False

    def __post_init__(self) -> None:
        if self.gguf is not None or (self.trust_remote_code and layout_in(self.folder) is not None):
            object.__setattr__(self, "trust_remote_code", False)

    def __str__(self) -> str:
        return str(self.folder if self.gguf is None else self.folder / self.gguf)

    @property
    def words(self) -> Path:
        """Where its tokenizer is read from: a folder, or its GGUF file."""
        return self.tokenizer or (self.folder if self.gguf is None else self.folder / self.gguf)

    def config(self, *, weights: bool = True) -> dict[str, Any]:
        """Read config.json (nothing of a GGUF file), and see that the files are those of a usable model.

        Args:
            weights: whether they should be here, too.

        Raises:
            AtlasError: a file is missing or damaged, or the checkpoint is of a kind that is not
                supported: quantised, or an adapter that the model's entry does not name.
        """
        if self.gguf is not None:
            check_gguf(self.folder / self.gguf)
            self._check_beside()
            return {}
        path = self.folder / "config.json"
        check_links(self.folder)
        self._refuse_adapter(alone=not path.is_file())
        if not path.is_file():
            raise AtlasError(f"{self}: expected a Hugging Face model, found no config.json")
        check_fetched([path])
        config = read_json(path)
        if not isinstance(config, dict):
            raise AtlasError(f"{path}: expected a JSON object, found {type(config).__name__}")
        check_quantised(str(self), config, self.dequantise)
        if self.adapter is not None and method_of(config) is not None and not self.dequantise:
            raise AtlasError(
                f"{self}: an adapter is merged into plain numbers, and this checkpoint is quantised "
                f"({method_of(config)}): say dequantise: true in the model's entry"
            )
        if config.get("transformers_weights") is not None:
            raise AtlasError(
                f"{path}: transformers_weights: not supported; name the weights {SAFE_FILE}"
            )
        for key, value in _types(config):
            if not isinstance(value, str):
                raise AtlasError(f"{path}: {key}: expected a type as float32, found {value}")
            if value.startswith("torch."):
                raise AtlasError(
                    f"{path}: {key}: found '{value}', expected '{value.removeprefix('torch.')}'"
                )
        self._check_generation()
        check_fetched([*(self.weight_files() if weights else ()), *self._small(self.folder)])
        self._check_beside()
        return config

    def _check_beside(self) -> None:
        """Refuse a tokenizer or an adapter in folders of their own that are not there."""
        if self.tokenizer is not None:
            if not os.path.isdir(self.tokenizer):
                raise AtlasError(f"models: tokenizer: {self.tokenizer}: no such folder")
            check_fetched(self._small(self.tokenizer))
        if self.adapter is not None:
            adapter_files(self.adapter, pickles=self.allow_pickle)

    def declared_types(self) -> list[tuple[str, str]]:
        """Keys of config.json that name a type, and the names."""
        if self.gguf is not None:
            return []
        return list(_types(read_json(self.folder / "config.json")))

    def dtype(self) -> str | None:
        """Type of its numbers, before a model's entry names another.

        That of config.json or of its text part; where neither has one, that of most of the weights, and of a
        GGUF file what it is dequantised into. None of pickles that nothing is said of.
        """
        if self.gguf is not None:
            return "float32"
        declared = dict(self.declared_types())
        keys = ("dtype", "torch_dtype", "text_config.dtype", "text_config.torch_dtype")
        named = [declared[key] for key in keys if key in declared]
        return named[0] if named else _most(self.weight_files())

    def settings(self) -> Iterator[tuple[str, Any]]:
        """Keys of config.json and of its parts, and their values."""
        return _flat(read_json(self.folder / "config.json") if self.gguf is None else {})

    def _check_generation(self) -> None:
        """Refuse a generation_config.json that transformers passes over, or whose tokens are no ids."""
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return
        check_fetched([path])
        content = read_json(path)
        if not isinstance(content, dict):
            raise AtlasError(f"{path}: expected a JSON object, found {type(content).__name__}")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = content.get(key)
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if value is not None and not all(type(one) is int for one in ids):
                raise AtlasError(f"{path}: {key}: expected the id of a token, found {value!r}")

    def _refuse_adapter(self, *, alone: bool) -> None:
        path = self.folder / ADAPTER
        if not path.is_file():
            return
        content = read_json(path)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        if alone:
            raise AtlasError(
                f"{self}: {ADAPTER}: it holds only an adapter of {base or 'a model'}; name that model in the "
                "entry, and this folder as its `adapter`"
            )
        raise AtlasError(
            f"{self}: {ADAPTER}: it holds an adapter beside the model; move the adapter to a folder of "
            "its own, and name that as `adapter` in the model's entry if it is to be merged into the model"
        )

    def pickled(self) -> bool:
        """Whether the weights are pickles, which the model's entry then must allow."""
        return self.weight_files()[0].suffix == ".bin"

    def weight_files(self) -> list[Path]:
        """The files with the weights, in the order of their names.

        Raises:
            AtlasError: there are none that may be used, or an index names files that are missing.
        """
        if self.gguf is not None:
            return [self.folder / self.gguf]
        # transformers takes one file before what an index lists, and so the digest is of that one. The
        # index is looked at all the same: one that lists what is not there was not meant to be passed over.
        listed, pickled = self._listed(SAFE_INDEX), self._listed(PICKLE_INDEX)
        files = sorted(self.folder.glob(SAFE_FILE)) or listed
        pickles = sorted(self.folder.glob(PICKLE_FILE)) or pickled
        if not files and not (pickles and self.allow_pickle):
            others = [*pickles, *sorted(self.folder.glob("*.safetensors"))]
            found = f"only {others[0].name}" if others else "none"
            raise AtlasError(
                f"{self}: expected weights in {SAFE_FILE}, or in *.safetensors that {SAFE_INDEX} names, "
                f"found {found}; a *.bin is a pickle, which runs code when it is loaded, and is used "
                "only if the model's entry says allow_pickle: true"
            )
        used = files or pickles
        # Unlike Path.is_file, this takes a name that no file can have for that of no file.
        named = listed if files else pickled
        missing = [path.name for path in named if not os.path.isfile(path)]
        if missing:
            raise AtlasError(f"{self}: the index names {missing[0]}, which is not there")
        return used

    def _listed(self, index: str) -> list[Path]:
        return [self.folder / name for name in shards(self.folder / index)]

    def _small(self, folder: Path) -> list[Path]:
        return [folder / name for name in files_read(folder, code=self.trust_remote_code)]

    def digest(self) -> str:
        """Digest of all that decides the model's output: weights, configuration, tokenizer, code, packing.

        Raises:
            AtlasError: see `weight_files`.
        """
        files: dict[str, Any] = {path.name: file_digest(path) for path in self.weight_files()}
        if self.gguf is None:
            files |= files_digest(self.folder, code=self.trust_remote_code)
            path = self.folder / "config.json"
            config = read_json(path) if path.is_file() else {}
            packed = method_of(config) if isinstance(config, dict) else None
            if packed is not None and not self.dequantise:
                # Its kernels round in a way of their own: not what the same files give in plain numbers.
                files["packed"] = packed
        if self.code_revision is not None:
            files["code_revision"] = self.code_revision
        if self.tokenizer is not None:
            files["tokenizer"] = files_digest(self.tokenizer, code=self.trust_remote_code)
        if self.adapter is not None:
            files["adapter"] = adapter_digest(self.adapter, pickles=self.allow_pickle)
        return digest(files)

    def code_files(self) -> list[Path]:
        """The Python that the folder brings, at any depth."""
        return [path for path in self._small(self.folder) if path.suffix == ".py"]

    def code_repository(self) -> str | None:
        """The other repository that the model's code is in, as `owner/name`; None for its own.

        Raises:
            AtlasError: there are several.
        """
        files = (
            self.folder / "config.json",
            (self.tokenizer or self.folder) / "tokenizer_config.json",
        )
        contents = [read_json(path) for path in files if path.is_file()]
        found = {name for content in contents for name in _foreign(content)}
        if len(found) > 1:
            raise AtlasError(f"{self}: its code is in {len(found)} repositories, one can be pinned")
        return found.pop() if found else None


def _most(files: list[Path]) -> str | None:
    """The type of most of the numbers in safetensors files; None where there is no such file."""
    from safetensors import safe_open

    counted: Counter[str] = Counter()
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = file.get_slice(name)
                counted[tensor.get_dtype()] += math.prod(tensor.get_shape())
    known = [FLOATING[kind] for kind, _ in counted.most_common() if kind in FLOATING]
    return known[0] if known else None


def _flat(config: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{inside}{key}.")
        else:
            yield inside + key, value


def _types(config: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a configuration, or of one of its parts, that name a type, and the names."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            yield inside + key, value
        elif isinstance(value, dict) and not inside:
            yield from _types(value, f"{key}.")


def _foreign(content: Any) -> set[str]:
    """Repositories of an `auto_map`, whose entries are `module.Class` or `owner/name--module.Class`."""
    entries = content.get("auto_map") if isinstance(content, dict) else None
    values = list(entries.values()) if isinstance(entries, dict) else [entries]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return {one.split("--")[0] for one in flat if isinstance(one, str) and "--" in one}


def shards(index: Path) -> list[str]:
    """The file names that an index of weights lists; none if there is no index.

    Raises:
        AtlasError: it is not such an index, or names files of other folders.
    """
    if not index.is_file():
        return []
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise AtlasError(f"{index}: expected 'weight_map', tensors and their files")
    for name in names.values():
        if Path(name).name != name or name in ("", ".", ".."):
            raise AtlasError(f"{index}: '{name}' is not the name of a file in this folder")
    return sorted(set(names.values()))
