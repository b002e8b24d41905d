"""What lm-eval's `--model_args` may say to the model `sparsity-atlas`, and what it is refused for.

lm-eval hands over whatever it was given. An argument that nobody reads would leave the model as it is,
and its score would pass for that of another one; so each is used, or ends the run.
"""

from __future__ import annotations

import inspect
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from pydantic import model_validator as check_model

from sparsity_atlas.config.findings import explain
from sparsity_atlas.config.model_entry import DiffusionSettings
from sparsity_atlas.diffusion.unmask import Remasking
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.spelling import Level, Revision
from sparsity_atlas.terms import SITES, well_spelled

_QUANTISED = "a quantised checkpoint runs as it is; dequantise=True has it in plain numbers"
_SPREAD = "device_map=auto spreads the model over the GPUs that CUDA_VISIBLE_DEVICES leaves, and host memory"
# Arguments of lm-eval's `hf` and of transformers, and what to do in place of them.
_INSTEAD = {
    "delta": "add the delta weights to the model first",
    **dict.fromkeys(("autogptq", "gptqmodel", "quantization_config"), _QUANTISED),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), _QUANTISED),
    **dict.fromkeys(("parallelize", "tp_plan", "offload_folder"), _SPREAD),
    **dict.fromkeys(("max_memory_per_gpu", "max_cpu_memory"), _SPREAD),
    "subfolder": "give a local folder as pretrained",
    "backend": "a model's own kind is seen, causal or masked-diffusion",
    "truncation": "what is too long loses its beginning, as in lm-eval's log-likelihoods",
    "logits_cache": "requests that run the same tokens always share them",
    "torch_dtype": "say dtype",
    **dict.fromkeys(("softmax_dtype", "mixed_precision_dtype"), "say dtype"),
    "attn_implementation": "the model's default is used",
    "use_fast_tokenizer": "the tokenizer is loaded as AutoTokenizer does",
    "max_batch_size": "it belongs to batch_size=auto, and sizes are fixed here",
}


def _batch_size(value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError("a number of sequences is wanted; it is fixed, since scores depend on it")
    return int(value)


def _device(value: Any) -> Any:
    # lm-eval's command says cuda:0 where the user says nothing.
    return {"cuda:0": "auto", "mps:0": "mps"}.get(value, value)


def _site(value: str) -> str:
    if not well_spelled(value):
        raise ValueError(
            f"expected {', '.join(SITES)}, or one of the first five in some parts of the layers, as "
            "intermediate@experts, or any in some layers, as input@layers0-3+7"
        )
    return value


class Arguments(BaseModel):
    """The arguments that are used. What else stands beside a criterion is a parameter of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pretrained: str
    """A local folder, or a repository of the Hub."""
    criterion: str | None = None
    """A built-in rule, or a Python file with one; without it the model stays dense."""
    site: Annotated[str, AfterValidator(_site)] | None = None
    """Where it is applied; in some parts of the layers only: `intermediate@experts`."""
    level: Level | None = None
    """At which level."""
    calibration: str | None = None
    """calibration.safetensors of the criterion at the site, if it is calibrated."""
    revision: Revision | None = None
    """Of the Hub repository."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository or folder brings."""
    code_revision: Revision | None = None
    """Revision of that code, where it is in another repository."""
    allow_pickle: bool = False
    """Load pickled weights if there are no safetensors."""
    dequantise: bool = False
    """Use a quantised checkpoint in plain numbers."""
    gguf_file: str | None = None
    """GGUF file in that folder or repository, which holds the model."""
    peft: str | None = None
    """A PEFT adapter that is merged into the model: a local folder, or a repository of the Hub."""
    modules: dict[str, str] | None = None
    """Module paths of the FFN, if they are not found (`--model_args` as JSON)."""
    tokenizer: str | None = None
    """A local folder, or a repository of the Hub; unset: the model's own."""
    batch_size: Annotated[int, BeforeValidator(_batch_size)] = 16
    """Sequences a forward pass."""
    max_length: PositiveInt | None = None
    """Longest sequence in tokens; unset: the model's own limit."""
    add_bos_token: bool | None = None
    """Begin each request with the BOS token; unset: as the tokenizer does."""
    prefix_token_id: int | None = None
    """Token before a request without context; unset: BOS, else EOS."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Computation type. `auto`: float32 on the CPU, the checkpoint's own type elsewhere."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], BeforeValidator(_device)] = "auto"
    """Where the model runs. `auto` and lm-eval's own cuda:0: CUDA, else Apple's MPS, else the CPU."""
    device_map: Literal["auto"] | None = None
    """Spread the model over all GPUs and host memory; see the configuration's key of this name."""
    think_end_token: str | int | None = None
    """As lm-eval's `hf` has it: what is generated before it is no part of the answer."""
    enable_thinking: bool | None = None
    """As lm-eval's `hf` has it, for the chat template."""
    chat_template_args: dict[str, Any] | None = None
    """As lm-eval's `hf` has it (`--model_args` as JSON)."""
    lm_eval_prefix: bool = False
    """See the configuration's key of this name."""
    chat_date: date = date(2024, 7, 26)
    """See the configuration's key of this name."""
    mask_token_id: NonNegativeInt | None = None
    """Of a masked-diffusion model, likewise."""
    shifted_logits: bool | None = None
    """Of a masked-diffusion model, likewise."""
    samples: PositiveInt | None = None
    """Of a masked-diffusion model, as the four below: see the configuration's `diffusion`."""
    guidance: NonNegativeFloat | None = None
    steps: PositiveInt | None = None
    block_length: PositiveInt | None = None
    remasking: Remasking | None = None

    @check_model(mode="after")
    def _complete(self) -> Self:
        named = [key for key in ("site", "level", "calibration") if getattr(self, key) is not None]
        if self.criterion is None and named:
            raise ValueError(f"{named[0]}: without a criterion, the model would stay dense")
        missing = [key for key in ("site", "level") if getattr(self, key) is None]
        if self.criterion is not None and missing:
            raise ValueError(f"criterion={self.criterion}: {' and '.join(missing)} missing")
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking: think_end_token is missing")
        return self

    def of_diffusion(self) -> list[str]:
        """Arguments that are said and mean nothing to a causal model."""
        names = ("mask_token_id", "shifted_logits", *DiffusionSettings.model_fields)
        return [name for name in names if getattr(self, name) is not None]

    def diffusion(self) -> dict[str, Any]:
        """How a masked-diffusion model is asked, as the configuration has it."""
        own = self.model_dump(include=set(DiffusionSettings.model_fields), exclude_none=True)
        return DiffusionSettings(**own).model_dump()

    def prompts(self) -> dict[str, Any]:
        """The settings of prompts, as `PromptSettings` names them."""
        options = dict(self.chat_template_args or {})
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        return {
            **{"add_bos_token": self.add_bos_token, "lm_eval_prefix": self.lm_eval_prefix},
            **{"chat_template_args": options, "think_end_token": self.think_end_token},
            "chat_date": self.chat_date.isoformat(),
        }


def parse(given: dict[str, Any], hf: type) -> tuple[Arguments, dict[str, Any]]:
    """Sort what lm-eval hands over.

    Args:
        given: the arguments by name.
        hf: the class of lm-eval's model `hf`.

    Returns:
        The arguments, and the parameters of the criterion, which its rule has yet to accept.

    Raises:
        AtlasError: names one that is unknown, not supported or not of its type, or what is missing.
    """
    own = {name: value for name, value in given.items() if name in Arguments.model_fields}
    known = inspect.signature(hf).parameters
    parameters = {}
    for name, value in given.items():
        if name in own or (name in known and value == known[name].default):
            continue
        if name in known or name in _INSTEAD:
            instead = _INSTEAD.get(name, "leave it out")
            raise AtlasError(
                f"model_args: {name}: not supported by sparsity-atlas, found {value!r}; {instead}"
            )
        parameters[name] = value
    if parameters and own.get("criterion") is None:
        raise AtlasError(
            f"model_args: unknown argument '{next(iter(parameters))}'; known: "
            f"{', '.join(Arguments.model_fields)}; beside a criterion also its parameters"
        )
    try:
        return Arguments(**own), parameters
    except ValidationError as error:
        found = "; ".join(explain(item) for item in error.errors())
        raise AtlasError(f"model_args: {found}") from None
