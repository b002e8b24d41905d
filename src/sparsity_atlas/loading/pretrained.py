"""How a checkpoint becomes a model or a tokenizer in memory; each is whole, or refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.whole import read_json
from sparsity_atlas.garbage import look_as_usual
from sparsity_atlas.loading.adapter import merge_adapter
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.devices import own_device, own_devices, pick_device, pick_dtype
from sparsity_atlas.loading.gguf_file import alone, dequantised, finish
from sparsity_atlas.loading.layouts import auto_class, layout_in, layout_of, tokenizer_class
from sparsity_atlas.loading.one_line import one_line
from sparsity_atlas.loading.quantised import as_numbers, in_numbers, method_of, unpack, where_packed

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Of a vocabulary without special tokens: one token may be there where there is no file at all.
FEWEST_TOKENS = 2
_NO_TOKENIZER = (
    "{}: expected a tokenizer (tokenizer.json, or the files of its tokenizer_class), found none"
)


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a language model for inference: causal, or a decoder in which each token sees all others.

    Args:
        checkpoint: its files.
        dtype: that it computes in; see `pick_dtype`.
        device: where; see `pick_device`.
        device_map: `auto`: spread over all GPUs and host memory, see `placement`; None: on one device.

    Raises:
        AtlasError: the folder or its weights cannot be used, or the weights are not all of the model's
            and nothing else; they do not fit into memory.
    """
    config = checkpoint.config()
    import torch

    from sparsity_atlas.files.mapped import let_go_of_files
    from sparsity_atlas.loading.free_memory import check_on_device, check_weights
    from sparsity_atlas.loading.placement import spread
    from sparsity_atlas.loading.wholeness import check_types, check_whole, fill_buffers
    from sparsity_atlas.sites.experts.implementation import run_whatever_their_shapes

    _check_declared_types(checkpoint)
    picked, whole = pick_device(device), device_map is None
    wanted = check_weights(checkpoint, pick_dtype(dtype, picked))
    target, *others = [own_device(picked)] if whole else own_devices(picked)
    check_on_device(str(checkpoint), wanted, [target, *others], spread=not whole)
    layout = layout_of(config)
    native: dict[str, Any] = {} if layout is None else {"key_mapping": dict(layout.keys)}
    what = f"cannot load model type '{config.get('model_type', 'unknown')}'"
    if checkpoint.gguf is not None:
        native, what = dequantised(), "cannot load it"
    packed = None if checkpoint.dequantise else method_of(config)
    if packed is not None:
        native |= where_packed(str(checkpoint), target, whole=whole)
    with one_line(checkpoint, what):
        found = _config(checkpoint)
        undone = as_numbers(found) if checkpoint.dequantise else nullcontext()
        with _files(checkpoint) as files, undone:
            loaded = auto_class(found).from_pretrained(
                **files,
                config=found,
                dtype=pick_dtype(dtype, target),
                use_safetensors=not checkpoint.pickled(),
                output_loading_info=True,
                # Else they end in an error that does not name them; here they are refused below.
                ignore_mismatched_sizes=True,
                **native,
                **_options(checkpoint),
            )
    look_as_usual()  # the libraries are here
    if not isinstance(loaded, tuple):
        raise AtlasError(f"{checkpoint}: its code loads weights and does not report which")
    model, report = loaded
    # First: their scales would be told as tensors that the model does not expect.
    if checkpoint.dequantise:
        with one_line(checkpoint, "cannot dequantise it"):
            model = in_numbers(model, pick_dtype(dtype, target))
    elif checkpoint.gguf is None and packed is None:
        check_types(checkpoint, model)
    check_whole(checkpoint, report, found)
    if checkpoint.gguf is not None:
        finish(model, checkpoint.folder / checkpoint.gguf)
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AtlasError(f"{checkpoint}: weights of type {model.dtype} are not supported")
    if model.is_custom_code():
        with one_line(checkpoint, "cannot make the model without its weights"):
            fill_buffers(model, trust_remote_code=checkpoint.trust_remote_code)
    if checkpoint.adapter is not None:
        with one_line(checkpoint, f"cannot merge the adapter {checkpoint.adapter}"):
            model = merge_adapter(model, checkpoint.adapter, pickles=checkpoint.allow_pickle)
    ready: PreTrainedModel = model.eval()
    run_whatever_their_shapes(ready)
    if packed is not None:
        unpack(ready, packed)
    if packed is None and checkpoint.gguf is None and not checkpoint.pickled():
        let_go_of_files(ready, checkpoint.weight_files())
    if whole:
        return ready if packed else moved(ready, target)
    return spread(ready, [target, *others])


def moved(model: PreTrainedModel, *where: torch.device | torch.dtype | str) -> PreTrainedModel:
    """The model itself, after `model.to(*where)`."""
    # transformers wraps `to` so that type checkers take it for a function that wants the model.
    to: Any = model.to
    to(*where)
    return model


def _check_declared_types(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that names what is no type; where the name is read, it is not told.

    Raises:
        AtlasError: names the key.
    """
    import torch

    for key, value in checkpoint.declared_types():
        if value != "auto" and not isinstance(getattr(torch, value, None), torch.dtype):
            raise AtlasError(
                f"{checkpoint}/config.json: {key}: found '{value}', expected float32, bfloat16 or float16"
            )


def blank(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without its weights; to be called where torch's default device is `meta`.

    Raises:
        AtlasError: its configuration or its code cannot be used.
    """
    with one_line(checkpoint, "cannot make the model without its weights"):
        config = _config(checkpoint)
        model: PreTrainedModel = auto_class(config).from_config(
            config, trust_remote_code=checkpoint.trust_remote_code
        )
    return model


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration that a model is made with."""
    from transformers import AutoConfig

    # Makes its own model types known, too.
    from sparsity_atlas.loading.rectified import with_fatrelu

    translated = None if checkpoint.gguf else _configured(checkpoint.folder).get("config")
    if translated is not None:
        return translated
    with _files(checkpoint) as files:
        found: PretrainedConfig = AutoConfig.from_pretrained(**files, **_options(checkpoint))
    return with_fatrelu(found, checkpoint.folder)


@contextmanager
def _files(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """What transformers' `from_pretrained` is to read a model from."""
    if checkpoint.gguf is None:
        yield {"pretrained_model_name_or_path": checkpoint.folder}
    else:
        with alone(checkpoint.folder / checkpoint.gguf) as files:
            yield files


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
    inside = checkpoint.gguf is not None and checkpoint.tokenizer is None
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with one_line(checkpoint, "cannot load the tokenizer"), _unremembered(), ExitStack() as stack:
        if inside:
            files = stack.enter_context(_files(checkpoint))
        else:
            files = {"pretrained_model_name_or_path": folder, **_configured(folder)}
        kind = AutoTokenizer if inside else tokenizer_class(folder)
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            **files, **options, **_options(checkpoint)
        )
        if inside:
            tokenizer.name_or_path = str(checkpoint)
        vocabulary = tokenizer.get_vocab().keys()
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # Where its files are missing, transformers makes one that knows its special tokens only.
    if len(vocabulary - added - set(tokenizer.all_special_tokens)) < FEWEST_TOKENS:
        raise AtlasError(_NO_TOKENIZER.format(folder))
    if not inside:
        _give_padding(tokenizer, checkpoint.folder)
    return tokenizer


def _configured(folder: Path) -> dict[str, PretrainedConfig]:
    """The configuration that a folder is loaded with in place of its own; nothing if that is known.

    Raises:
        AtlasError: see `Layout.config`.
    """
    path = folder / "config.json"
    layout = layout_in(folder)
    return {} if layout is None else {"config": layout.config(read_json(path), path)}


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
