"""Models in a GGUF file, as llama.cpp runs them: read by transformers, and dequantised.

All of such a model lies in the one file: configuration, tokenizer, chat template and weights. Whatever lies
beside it is not read.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.loading.contents import check_fetched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAGIC = b"GGUF"
# What llama.cpp scales the frequencies of rotary embeddings with, where they grow with the context.
FREQUENCIES = "rope_freqs.weight"
# Of other ways to do so, for which transformers has settings of its own.
_OTHER_FREQUENCIES = ("rope_factors_long.weight", "rope_factors_short.weight")


def check_gguf(path: Path) -> None:
    """See that a file is there, and is one.

    Raises:
        AtlasError: it is not.
    """
    if not path.is_file():
        raise AtlasError(f"{path}: no such file")
    check_fetched([path])
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise AtlasError(f"{path}: expected a GGUF file, found another format")


def describe_gguf(path: Path) -> dict[str, Any]:
    """What a manifest says of a GGUF file.

    Returns:
        `file`: its name; `architecture`: as llama.cpp calls it; `quantisation`: of the file as a whole, if it
        says so; `types`: numbers of its tensors in each type.

    Raises:
        AtlasError: the package gguf is missing, or the file is one of several.
    """
    import gguf

    reader = _reader(path)
    name = None
    if "general.file_type" in reader.fields:
        number = int(reader.fields["general.file_type"].contents())
        known = {int(one): one.name for one in gguf.LlamaFileType}
        name = known.get(number, str(number)).removeprefix("MOSTLY_").removeprefix("ALL_")
    counted = Counter(one.tensor_type.name for one in reader.tensors)
    return {
        "file": path.name,
        "architecture": reader.fields["general.architecture"].contents(),
        "quantisation": name,
        "types": dict(sorted(counted.items())),
    }


def count_numbers(path: Path) -> int:
    """Numbers in all tensors of a file; see `describe_gguf` for what is raised."""
    return sum(int(one.n_elements) for one in _reader(path).tensors)


@contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """What transformers' `from_pretrained` wants, to read a GGUF file and nothing beside it.

    Meanwhile transformers gets the one reader that there is of the file, and each table of names once. Else
    it reads all fields, of which a vocabulary has a hundred thousand, for the configuration, the tokenizer
    and the weights each, and makes the table anew for each module: 19 s of a core for a model of 135 M
    parameters, where it is seven now.

    Raises:
        AtlasError: see `describe_gguf`.
    """
    reader = _reader(path)
    import gguf

    names = functools.lru_cache(gguf.get_tensor_name_map)
    with TemporaryDirectory() as folder:
        link = Path(folder, path.name)
        link.symlink_to(path.resolve())
        with mock.patch.multiple(gguf, GGUFReader=lambda _: reader, get_tensor_name_map=names):
            yield {"pretrained_model_name_or_path": folder, "gguf_file": link.name}


def dequantised() -> dict[str, Any]:
    """What tells transformers to keep no weight packed; older releases never do."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def finish(model: PreTrainedModel, path: Path) -> None:
    """Use what transformers leaves in the file, and see that it has left nothing else.

    Args:
        model: as transformers made it of the file; its rotary frequencies are changed.
        path: of the file.

    Raises:
        AtlasError: some of the file's tensors are in no weight of the model.
    """
    import torch

    tensors = {one.name: one for one in _reader(path).tensors}
    frequencies = tensors.pop(FREQUENCIES, None)
    for name in _OTHER_FREQUENCIES:
        tensors.pop(name, None)
    if model.config.get_text_config().tie_word_embeddings:
        # Some files hold the table twice.
        tensors.pop("output.weight", None)
    held = sum(one.numel() for one in model.parameters())
    found = sum(int(one.n_elements) for one in tensors.values())
    if held != found:
        raise AtlasError(
            f"{path}: its tensors hold {found:,} numbers, and the {type(model).__name__} that transformers "
            f"makes of them {held:,}: it would be another model"
        )
    if frequencies is None:
        return
    factors = torch.tensor(frequencies.data.copy(), dtype=torch.float32).flatten()
    changed = False
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            buffer = getattr(module, name, None)
            if isinstance(buffer, torch.Tensor) and buffer.shape == factors.shape:
                buffer /= factors.to(buffer)
                changed = True
    rope = getattr(model.config, "rope_parameters", None) or {}
    if not changed or rope.get("rope_type", "default") != "default":
        raise AtlasError(
            f"{path}: {FREQUENCIES}: factors of rotary frequencies, for which {type(model).__name__} has no "
            "place"
        )


def _reader(path: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise AtlasError(f"{path}: GGUF is read by the package gguf: pip install gguf")
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: Path, time: int, size: int) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        reader.fields["general.architecture"].contents()
    except Exception as error:  # noqa: BLE001 (numpy's and the library's own, for whatever is damaged)
        raise AtlasError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    count = reader.fields.get("split.count")
    if count is not None and int(count.contents()) > 1:
        raise AtlasError(
            f"{path}: one of {int(count.contents())} files; merge them (llama-gguf-split --merge)"
        )
    return reader
