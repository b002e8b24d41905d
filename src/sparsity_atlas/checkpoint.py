"""A model's files on this machine: which they are, their digest, and how they are loaded.

Weights are safetensors. A pickle runs code when it is loaded, and so does a repository's own Python; either
is used only where the model's entry of the configuration says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.devices import own_device, pick_device, pick_dtype
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.store import digest, file_digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAFE_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# Of the files that are no weights; a repository's Python comes with them where it is trusted.
SMALL = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder and what may be done with it.

    code_revision: commit of the other repository that the model's code is in, if it is in another.
    """

    folder: Path
    trust_remote_code: bool = False
    allow_pickle: bool = False
    code_revision: str | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def config(self) -> dict[str, Any]:
        """Read config.json, and see that all is there that a model needs.

        Raises:
            AtlasError: a file is missing or damaged, or the checkpoint is quantised.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            raise AtlasError(f"{self}: expected a Hugging Face model, found no config.json")
        config = read_json(path)
        if not isinstance(config, dict):
            raise AtlasError(f"{path}: expected a JSON object, found {type(config).__name__}")
        quantised = config.get("quantization_config")
        if quantised is not None:
            method = (
                quantised.get("quant_method") if isinstance(quantised, dict) else None
            ) or "unknown method"
            raise AtlasError(f"{self}: a quantised checkpoint ({method}) is not supported yet")
        self.weight_files()
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((self.folder / name).is_file() for name in names):
            raise AtlasError(f"{self}: expected a tokenizer (tokenizer.json), found none")
        return config

    def small(self) -> tuple[str, ...]:
        """Endings of the files that a model needs beside its weights."""
        return (*SMALL, ".py") if self.trust_remote_code else SMALL

    def pickled(self) -> bool:
        """Whether the weights are pickles, which the model's entry then must allow."""
        return self.weight_files()[0].suffix == ".bin"

    def weight_files(self) -> list[Path]:
        """The files with the weights, in the order of their names.

        Raises:
            AtlasError: there are none that may be used, or an index names files that are missing.
        """
        files = (
            self._listed(SAFE_INDEX)
            or sorted(self.folder.glob("model.safetensors"))
            or sorted(self.folder.glob("*.safetensors"))
        )
        pickles = self._listed(PICKLE_INDEX) or sorted(self.folder.glob("pytorch_model.bin"))
        if not files and not (pickles and self.allow_pickle):
            found = f"only {pickles[0].name}" if pickles else "none"
            raise AtlasError(
                f"{self}: expected weights in *.safetensors, found {found}; a *.bin is a pickle, which "
                "runs code when it is loaded, and is used only if the model's entry says "
                "allow_pickle: true"
            )
        used = files or pickles
        # Unlike Path.is_file, this takes a name that no file can have for that of no file.
        missing = [path.name for path in used if not os.path.isfile(path)]
        if missing:
            raise AtlasError(f"{self}: the index names {missing[0]}, which is not there")
        return used

    def _listed(self, index: str) -> list[Path]:
        return [self.folder / name for name in shards(self.folder / index)]

    def digest(self) -> str:
        """Digest of all that decides the model's output: weights, configuration, tokenizer, code.

        Raises:
            AtlasError: see `weight_files`.
        """
        others = [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and path.name.endswith(self.small())
        ]
        files = {path.name: file_digest(path) for path in [*self.weight_files(), *others]}
        if self.code_revision is not None:
            files["code_revision"] = self.code_revision
        return digest(files)

    def code_repository(self) -> str | None:
        """The other repository that the model's code is in, as `owner/name`; None for its own.

        Raises:
            AtlasError: there are several.
        """
        files = (self.folder / name for name in ("config.json", "tokenizer_config.json"))
        contents = [read_json(path) for path in files if path.is_file()]
        found = {name for content in contents for name in _foreign(content)}
        if len(found) > 1:
            raise AtlasError(f"{self}: its code is in {len(found)} repositories, one can be pinned")
        return found.pop() if found else None

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": True}
        # Never None, at which transformers asks on standard input.
        options["trust_remote_code"] = self.trust_remote_code
        if self.code_revision is not None:
            options["code_revision"] = self.code_revision
        return options

    def blank(self) -> PreTrainedModel:
        """The model without its weights; to be called where torch's default device is `meta`."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder, **self._options())
        return AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)


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


def load(checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal LM for inference.

    Raises:
        AtlasError: the folder or its weights cannot be used.
    """
    config = checkpoint.config()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    target = own_device(pick_device(device))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=pick_dtype(dtype, target),
            use_safetensors=not checkpoint.pickled(),
            **checkpoint._options(),
        )
    except SafetensorError as error:
        raise AtlasError(f"{checkpoint}: damaged safetensors file ({error})") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        kind = config.get("model_type", "unknown")
        raise AtlasError(
            f"{checkpoint}: cannot load model type '{kind}': {_first_line(error)}"
        ) from None
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AtlasError(f"{checkpoint}: weights of type {model.dtype} are not supported")
    return model.to(target).eval()


def load_tokenizer(
    checkpoint: Checkpoint, *, add_bos_token: bool | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        checkpoint: its folder.
        add_bos_token: whether it puts BOS before a text, as lm-eval passes it on; None: as it does by
            itself. Not every tokenizer obeys; see `bos.begins_with_bos`.

    Raises:
        AtlasError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        return AutoTokenizer.from_pretrained(checkpoint.folder, **options, **checkpoint._options())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AtlasError(f"{checkpoint}: cannot load the tokenizer: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it is defined by Python code of its repository, which is not run; read that code, and "
            "if you trust it, say trust_remote_code: true in the model's entry"
        )
    return text.splitlines()[0] if text else type(error).__name__
