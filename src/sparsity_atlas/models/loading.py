"""How a checkpoint becomes a model or a tokenizer in memory; each is whole, or refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_json
from sparsity_atlas.models.checkpoint import Checkpoint
from sparsity_atlas.models.devices import own_device, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Of a vocabulary without special tokens: one token may be there where there is no file at all.
FEWEST_TOKENS = 2
_NO_TOKENIZER = (
    "{}: expected a tokenizer (tokenizer.json, or the files of its tokenizer_class), found none"
)


def load(checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal LM for inference.

    Raises:
        AtlasError: the folder or its weights cannot be used, or the weights are not all of the model's
            and nothing else; they do not fit into memory.
    """
    config = checkpoint.config()
    import torch
    from transformers import AutoModelForCausalLM

    from sparsity_atlas.models.room import check_weights
    from sparsity_atlas.models.wholeness import check_whole, fill_buffers

    picked = pick_device(device)
    check_weights(checkpoint, pick_dtype(dtype, picked))
    target = own_device(picked)
    with _one_line(checkpoint, f"cannot load model type '{config.get('model_type', 'unknown')}'"):
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=pick_dtype(dtype, target),
            use_safetensors=not checkpoint.pickled(),
            output_loading_info=True,
            # Else they end in an error that does not name them; here they are refused below.
            ignore_mismatched_sizes=True,
            **_options(checkpoint),
        )
    if not isinstance(loaded, tuple):
        raise AtlasError(f"{checkpoint}: its code loads weights and does not report which")
    model, report = loaded
    check_whole(checkpoint, report)
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AtlasError(f"{checkpoint}: weights of type {model.dtype} are not supported")
    if model.is_custom_code():
        with _one_line(checkpoint, "cannot make the model without its weights"):
            fill_buffers(model, trust_remote_code=checkpoint.trust_remote_code)
    return model.to(target).eval()


def blank(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without its weights; to be called where torch's default device is `meta`.

    Raises:
        AtlasError: its configuration or its code cannot be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _one_line(checkpoint, "cannot make the model without its weights"):
        config = AutoConfig.from_pretrained(checkpoint.folder, **_options(checkpoint))
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=checkpoint.trust_remote_code
        )


def load_tokenizer(
    checkpoint: Checkpoint, *, add_bos_token: bool | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, from the folder that its entry names for it or from the model's own.

    Args:
        checkpoint: its folder.
        add_bos_token: whether it puts BOS before a text, as lm-eval passes it on; None: as it does by
            itself. Not every tokenizer obeys; see `bos.begins_with_bos`.

    Raises:
        AtlasError: it cannot be loaded, or the folder has none.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.tokenizer or checkpoint.folder
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with _one_line(checkpoint, "cannot load the tokenizer"), _unremembered():
        tokenizer = AutoTokenizer.from_pretrained(folder, **options, **_options(checkpoint))
        vocabulary = tokenizer.get_vocab().keys()
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # Where its files are missing, transformers makes one that knows its special tokens only.
    if len(vocabulary - added - set(tokenizer.all_special_tokens)) < FEWEST_TOKENS:
        raise AtlasError(_NO_TOKENIZER.format(folder))
    _give_padding(tokenizer, checkpoint.folder)
    return tokenizer


def _give_padding(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Pad with a token of the model, where the tokenizer names none (a tokenizer.json alone).

    lm-eval would add a token for it, of which the model's embedding knows nothing.
    """
    if any((tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token)):
        return
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        content = read_json(path) if path.is_file() else None
        for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = content.get(key) if isinstance(content, dict) else None
            number = value[0] if isinstance(value, list) and value else value
            if type(number) is int and 0 <= number < len(tokenizer):
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
                return


@contextmanager
def _unremembered() -> Iterator[None]:
    """Have tiktoken read its files: it remembers them by their paths, whatever becomes of them."""
    key = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(key)
    os.environ[key] = ""
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    options: dict[str, Any] = {"local_files_only": True}
    # Never None, at which transformers asks on standard input.
    options["trust_remote_code"] = checkpoint.trust_remote_code
    if checkpoint.code_revision is not None:
        options["code_revision"] = checkpoint.code_revision
    return options


@contextmanager
def _one_line(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while somebody's files and code are loaded into one line.

    Raises:
        AtlasError: says what failed and why.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise AtlasError(f"{checkpoint}: damaged safetensors file ({error})") from None
    except Exception as error:  # noqa: BLE001 (a repository's own code may raise anything)
        raise AtlasError(f"{checkpoint}: {what}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it is defined by Python code of its repository, which is not run; read that code, and "
            "if you trust it, say trust_remote_code: true in the model's entry"
        )
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return "expected tokenizer.json, or the files of its tokenizer_class, found none"
    first = text.splitlines()[0] if text else ""
    # Of these, the texts alone say little: a KeyError's is the key.
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
