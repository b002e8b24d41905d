"""Stage `models`: resolve a model, prove where its FFN sites are, and write its manifest.

The manifest is what later stages load the model by. It names the source as the configuration does
(no path of this machine), so that results can be moved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.devices import own_device, pick_device, pick_dtype
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.store import digest, file_digest, read_manifest, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.ffn import Activation

# All that Hugging Face needs of a repository; never pickled weights.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(source: dict[str, Any], *, revision: str | None = None, offline: bool = False) -> Path:
    """The local folder of a model: itself, or the Hub's snapshot in the cache (`HF_HOME`).

    Args:
        source: `{"path": folder}` or `{"hub": repository, "revision": ...}`.
        revision: the commit to use in place of the source's own revision.
        offline: use the cache only.

    Raises:
        AtlasError: no such folder, or the Hub could not give the repository.
    """
    if "path" in source:
        folder = Path(source["path"])
        if not folder.is_dir():
            raise AtlasError(f"models: {folder}: no such folder")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = revision or source.get("revision") or "main"
    try:
        return Path(
            snapshot_download(
                source["hub"], revision=wanted, allow_patterns=PATTERNS, local_files_only=offline
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AtlasError(
            f"models: cannot fetch {source['hub']} at {wanted} from the Hub: {reason}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        AtlasError: there are none, or the index names files that are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise AtlasError(f"{folder}: {index.name} names {missing[0]}, which is not there")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin"))
        found = f"only {pickled[0].name}, a pickle, which is not loaded" if pickled else "none"
        raise AtlasError(f"{folder}: expected weights in *.safetensors, found {found}")
    return files


def content_digest(folder: Path) -> str:
    """Digest of all that decides a model's output: weights, configuration and tokenizer."""
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in (".json", ".model", ".jinja") or path.name.endswith(".txt"))
    ]
    files = {path.name: file_digest(path) for path in [*weight_files(folder), *others]}
    return digest(files)


def check_folder(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        AtlasError: a file that a model needs is missing, or the checkpoint is quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AtlasError(f"{folder}: expected a Hugging Face model, found no config.json")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise AtlasError(f"{path}: not JSON ({error})") from None
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise AtlasError(f"{folder}: a quantised checkpoint ({method}) is not supported yet")
    weight_files(folder)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise AtlasError(f"{folder}: expected a tokenizer (tokenizer.json), found none")
    return config


def load(folder: Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal LM for inference.

    Raises:
        AtlasError: the folder or its weights cannot be used.
    """
    config = check_folder(folder)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    target = own_device(pick_device(device))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=pick_dtype(dtype, target), use_safetensors=True, local_files_only=True
        )
    except SafetensorError as error:
        raise AtlasError(f"{folder}: damaged safetensors file ({error})") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        kind = config.get("model_type", "unknown")
        raise AtlasError(
            f"{folder}: cannot load model type '{kind}': {_first_line(error)}"
        ) from None
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AtlasError(f"{folder}: weights of type {model.dtype} are not supported")
    return model.to(target).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        AtlasError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AtlasError(f"{folder}: cannot load the tokenizer: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def from_manifest(path: Path) -> tuple[dict[str, Any], Path]:
    """A model's manifest and its local folder, checked to hold what the manifest was written for.

    Raises:
        AtlasError: the weights changed since, or are not there any more.
    """
    manifest = read_manifest(path)
    source = manifest["source"]
    try:
        folder = resolve(source, revision=manifest["revision"], offline=True)
    except AtlasError:
        if "path" in source:
            raise
        folder = resolve(source, revision=manifest["revision"])  # the cache was emptied
    if "path" in source and content_digest(folder) != manifest["digest"]:
        raise AtlasError(
            f"{folder}: changed since {path} was written; delete that file and run again"
        )
    return manifest, folder


def describe(folder: Path, modules: dict[str, str] | None) -> dict[str, Any]:
    """Architecture, sizes and proven sites of a model, as its manifest states them."""
    from sparsity_atlas.sites import find_ffns

    config = check_folder(folder)
    # A probe on meta weights would prove nothing: the real ones are loaded, once, on the CPU.
    model = load(folder, dtype="auto", device="auto")
    load_tokenizer(folder)
    ffns = find_ffns(model, modules)
    total = model.num_parameters()
    return {
        "architecture": (config.get("architectures") or [type(model).__name__])[0],
        "model_type": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "parameters": {"total": total, "non_embedding": total - _embedding_parameters(model)},
        "layers": len(ffns),
        "hidden": ffns[0].hidden,
        "width": max(ffn.width for ffn in ffns),
        "sites": list(ffns[0].sites()),
        "activation": _activation(model, ffns[0].activation),
        "ffn": [ffn.describe() for ffn in ffns],
    }


def _activation(model: PreTrainedModel, activation: Activation) -> str:
    """What the nonlinearity is, by its function or its module's class: silu, relu, ..."""
    if activation.path is None:
        return activation.name.lower()
    kind = type(model.get_submodule(activation.path)).__name__
    return kind.removesuffix("Activation").lower()


def _embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters of token and position embeddings and of the output head, shared ones once."""
    import torch

    tables = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    }
    head = model.get_output_embeddings()
    if head is not None:
        tables[id(head.weight)] = head.weight
    return sum(table.numel() for table in tables.values())


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_atlas.models", description=__doc__)
    parser.add_argument("--name", required=True, help="name of the model in the configuration")
    parser.add_argument(
        "--source", required=True, type=json.loads, help="JSON: path, or hub and revision"
    )
    parser.add_argument("--sites", default="", help="comma-separated sites that the run asks for")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    arguments = parser.parse_args()

    source = dict(arguments.source)
    modules = source.pop("modules", None)
    folder = resolve(source)
    check_folder(folder)
    # The Hub's cache names a snapshot's folder by its commit.
    revision = folder.name if "hub" in source else None
    description = describe(folder, modules)
    check_sites(arguments.name, filter(None, arguments.sites.split(",")), description["sites"])
    write_manifest(
        arguments.output,
        {
            "name": arguments.name,
            "source": source,
            "revision": revision,
            "digest": content_digest(folder),
            **description,
        },
    )
    cli.logger.info(
        "%s: %s, %d layers, %s parameters, sites %s",
        arguments.name,
        description["architecture"],
        description["layers"],
        f"{description['parameters']['total']:,}",
        ", ".join(description["sites"]),
    )


def check_sites(model: str, wanted: Any, found: list[str]) -> None:
    """Refuse sites that a model does not have.

    Raises:
        AtlasError: names the first one and those that exist.
    """
    for site in wanted:
        if site not in found:
            raise AtlasError(
                f"models.{model}: no site '{site}' in this model; it has {', '.join(found)}"
            )


if __name__ == "__main__":
    cli.run(main)
