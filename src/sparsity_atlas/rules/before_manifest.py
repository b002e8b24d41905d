"""What a model takes in host memory of which there are files at most, since its manifest is not written."""

from __future__ import annotations

from pathlib import Path

from sparsity_atlas.files.whole import read_json
from sparsity_atlas.models.memory import MIB
from sparsity_atlas.rules.beside_gpu import of_loading

# Of a model of which nothing is known: its manifest is not written and its weights are not here.
UNKNOWN_WEIGHTS_MIB = 32000
# Tokens whose logits the proof of a model compares, and copies of them in float32.
PROVED_TOKENS, PROVED_COPIES = 64, 6
# Tokens of a vocabulary whose file is not opened.
GGUF_VOCABULARY = 2**18
# Of four bits a number in most GGUF files.
NUMBERS_OF_A_BYTE = 2
# Of the numbers of a GGUF file that is not opened, those of its embedding: this share, or fewer.
WIDEST_SHARE = 8


def before_manifest(path: str | None, gguf: str | None = None) -> int:
    """MiB that a model will need that has no manifest yet: its files at float32, its proof, or a guess."""
    size = None if gguf is None else gguf_bytes(path, gguf)
    if size is not None:
        # In float32 twice, while it is copied.
        return (
            2 * 4 * NUMBERS_OF_A_BYTE * size + PROVED_TOKENS * GGUF_VOCABULARY * 4 * PROVED_COPIES
        ) // MIB
    files = _safetensors(path)
    if path is None or files is None:
        return UNKNOWN_WEIGHTS_MIB
    config = Path(path, "config.json")
    content = read_json(config) if config.is_file() else {}
    content = content.get("text_config", content) if isinstance(content, dict) else {}
    vocabulary = content.get("vocab_size") or 0
    # In float32 twice as much as in 16 bits; beside it first the files that are mapped, then the proof.
    return (2 * files + max(files, PROVED_TOKENS * vocabulary * 4 * PROVED_COPIES)) // MIB


def before_manifest_on_gpu(path: str | None, gguf: str | None = None) -> int:
    """Of these what is in host memory where the model will be on a GPU: it is loaded in its files' type."""
    size = None if gguf is None else gguf_bytes(path, gguf)
    if size is not None:
        numbers = NUMBERS_OF_A_BYTE * size
        return of_loading(4 * numbers, size, numbers // WIDEST_SHARE) // MIB
    files = _safetensors(path)
    return UNKNOWN_WEIGHTS_MIB if files is None else of_loading(files, files) // MIB


def gguf_bytes(path: str | None, gguf: str) -> int | None:
    """Bytes of a GGUF file; None if it is not here."""
    file = Path(path or "", gguf)
    return file.stat().st_size if file.is_file() else None


def _safetensors(path: str | None) -> int | None:
    """Bytes of the safetensors in a folder; None if it is not here."""
    if path is None or not Path(path).is_dir():
        return None
    return sum(one.stat().st_size for one in Path(path).glob("*.safetensors"))
