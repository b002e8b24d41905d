"""A model's entry in the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from sparsity_atlas.config.strict import Strict, filled, some
from sparsity_atlas.spelling import Name, Repository, Revision, RevisionName
from sparsity_atlas.terms import Site


class DiffusionSettings(Strict):
    """How a masked-diffusion model is asked."""

    samples: int = Field(default=32, gt=0)
    """Forward passes of a row for each likelihood, at most. An answer of so few tokens that all sets of
    masked tokens are no more than that has an exact bound (five tokens: 31 sets), any other an estimate."""
    guidance: float = Field(default=0.0, ge=0)
    """Weight of classifier-free guidance, which takes a second pass with the prompt masked; 0: none."""
    steps: int | None = Field(default=None, gt=0)
    """Passes in which a text is generated; more than its tokens are as many as these. Unset: a token a
    pass. A task's `generation_kwargs` may say otherwise, as of the next two."""
    block_length: int = Field(default=32, gt=0)
    """Tokens of a block; a block is whole before the next one begins."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which tokens a pass leaves masked: those that the model is least sure of, or any."""


class RevisionEntry(Strict):
    """One checkpoint along a model's training."""

    revision: Revision | None = None
    """Hub revision, or folder below the entry's `path`. Unset: the key."""
    tokens: PositiveFloat | None = None
    """Tokens that it was trained on. Unset: read from its name (`step1000-tokens4B`; `step1000` with
    `tokens_per_step`) or, in a local folder, from training.json (`tokens_seen`) or trainer_state.json
    (`num_input_tokens_seen`)."""


class ModelEntry(Strict):
    """A causal or masked-diffusion language model: a local folder or a Hub repository, in Hugging Face
    format."""

    path: str | None = None
    """Folder with config.json, safetensors weights and the tokenizer."""
    hub: Repository | None = None
    """Hub repository, for instance meta-llama/Llama-3.2-1B."""
    revision: Revision | None = None
    """Hub revision: a commit, tag or branch. It is resolved to a commit, which is recorded."""
    revisions: (
        Annotated[
            Annotated[list[RevisionName], AfterValidator(some), Tag("list[revisions]")]
            | Annotated[
                dict[RevisionName, RevisionEntry | None],
                AfterValidator(filled),
                Tag("literal[mapping]"),
            ],
            # One branch, so that one mistake is told once.
            Discriminator(
                lambda value: "literal[mapping]" if isinstance(value, dict) else "list[revisions]"
            ),
        ]
        | None
    ) = None
    """Checkpoints along one training: Hub revisions, or folders below `path`; a list, or a mapping that says
    more of each. Each is a model `<name>-<revision>` with all else of this entry; `<name>` in a run block
    means all of them. What their training makes of their sparsity: docs/studies.md."""
    tokens_per_step: PositiveInt | None = None
    """Tokens of a step of that training, where revisions are named by steps (Pythia: 2097152)."""
    series: Name | None = None
    """Training that this is one checkpoint of, where they are entries of their own, not `revisions`."""
    training_tokens: PositiveFloat | None = None
    """Tokens that this checkpoint of a `series` was trained on. Unset: read as those of `revisions` are."""
    gguf: str | None = None
    """GGUF file that holds the model: in the folder or repository, or by its own path. It is dequantised, and
    its tokenizer used. Needs the package gguf."""
    tokenizer: str | None = None
    """Folder of another tokenizer than the model's own."""
    adapter: str | None = None
    """Folder of a PEFT adapter (adapter_config.json, adapter_model.safetensors), which is merged into the
    model."""
    adapter_hub: Repository | None = None
    """Hub repository of that adapter, if it is there."""
    adapter_revision: Revision | None = None
    """Revision of that repository. Resolved and recorded."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository or folder brings. Read it first."""
    code_revision: Revision | None = None
    """Revision of that code, where it is in another repository. Resolved and recorded likewise."""
    mask_token_id: NonNegativeInt | None = None
    """Token that masks others, of a masked-diffusion model whose config.json names none."""
    shifted_logits: bool | None = None
    """Whether a masked-diffusion model's logits at a token are of the next one, as where it was made of a
    causal model. Unset: as its published layout has it (Dream: yes), else not."""
    allow_pickle: bool = False
    """Load pickled weights (*.bin) if there are no safetensors. A pickle may hide code."""
    dequantise: bool = False
    """Use a quantised checkpoint (FP8, mxfp4, compressed-tensors, bitsandbytes) in plain numbers. Without it
    one in compressed-tensors, bitsandbytes, GPTQ or AWQ runs packed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Computation type. `auto`: float32 on the CPU, the checkpoint's own type elsewhere."""
    device_map: Literal["auto"] | None = None
    """`auto`: spread a model that is larger than a GPU over all of them, and over host memory where they do
    not hold it; each of its jobs then has all GPUs to itself. Unset: on one device."""
    add_bos_token: bool | None = None
    """Begin each request, and each captured sequence, with the BOS token. Unset: as the tokenizer does by
    itself."""
    lm_eval_prefix: bool = False
    """Put lm-eval's prefix token before whole texts (`loglikelihood_rolling`) also where they begin with BOS,
    so that there are two and the second is scored, as lm-eval does. Unset: one."""
    apply_chat_template: bool = False
    """Wrap each request in the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """With a chat template: few-shot examples are turns of their own; false: all stand in the user's one."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """What the chat template gets besides, for instance `{enable_thinking: false}`."""
    system_instruction: str | None = Field(default=None, min_length=1)
    """System prompt, before a task's own description; without a chat template it begins each prompt."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Settings of generation, for instance `{max_gen_toks: 512}`; they outweigh a task's own."""
    think_end_token: str | int | None = None
    """Token that ends a generated chain of thought; what comes before it is not part of the answer."""
    max_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens. Unset: the model's own limit. Whole texts are read in windows of this
    length, whose memory grows with it."""
    batch_size: int = Field(default=16, gt=0)
    """Sequences a forward pass, or as many tokens where a task's are shorter than its longest; on a GPU than
    1,024 tokens, up to 4,096 where the model is narrow. Fixed and recorded: in bfloat16 scores depend on it.
    Memory grows with it, but for logits, which are made a piece at a time."""
    diffusion: DiffusionSettings | None = None
    """Of a masked-diffusion model: how it is asked. Unset: as the defaults have it."""
    sites: Annotated[list[Site], AfterValidator(some)] | None = None
    """Sites for the run blocks that name none."""
    modules: dict[str, str] | None = None
    """Module paths of the FFN (`up`, `gate`, `down`, or `gate_up` with `order`), if they are not found."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        alone = self.gguf is not None and self.path is None
        if (self.path is None) == (self.hub is None) and not (alone and self.hub is None):
            raise ValueError("give either `path` (a local folder) or `hub` (a Hub repository)")
        if self.hub is not None and self.gguf is not None and not _inside(self.gguf):
            raise ValueError("gguf: a file of the repository is wanted, by its path there")
        if self.dequantise and self.gguf is not None:
            raise ValueError("dequantise: a GGUF file always is")
        if self.hub is None and self.revision is not None:
            raise ValueError("`revision` belongs to `hub`, a local folder has none")
        if self.adapter is not None and self.adapter_hub is not None:
            raise ValueError("give either `adapter` (a local folder) or `adapter_hub`, not both")
        if self.adapter_revision is not None and self.adapter_hub is None:
            raise ValueError("`adapter_revision` belongs to `adapter_hub`")
        if self.code_revision is not None and not self.trust_remote_code:
            raise ValueError("`code_revision` needs `trust_remote_code: true`")
        return self

    @model_validator(mode="after")
    def _one_checkpoint_or_several(self) -> Self:
        if self.revisions is None:
            if self.tokens_per_step is not None:
                raise ValueError("`tokens_per_step` belongs to `revisions`")
            if self.training_tokens is not None and self.series is None:
                raise ValueError("`training_tokens` belongs to a `series`")
            return self
        for key in ("revision", "series", "training_tokens"):
            if getattr(self, key) is not None:
                raise ValueError(f"give either `revisions` or `{key}`, not both")
        if self.path is None and self.hub is None:
            raise ValueError("`revisions` are of a `hub` repository, or folders below a `path`")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.chat_template_args and not self.apply_chat_template:
            raise ValueError("`chat_template_args` needs `apply_chat_template: true`")
        if not self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("`fewshot_as_multiturn: false` needs `apply_chat_template: true`")
        aliases = {"max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"}
        for key in aliases & self.gen_kwargs.keys():
            raise ValueError(
                f"gen_kwargs: {key}: say max_gen_toks, which a task may have said, too"
            )
        sampling = {"temperature", "top_p", "top_k", "min_p"} & self.gen_kwargs.keys()
        if sampling and "do_sample" not in self.gen_kwargs:
            raise ValueError(
                f"gen_kwargs: {min(sampling)} without do_sample, which most tasks set to false"
            )
        return self


def _inside(path: str) -> bool:
    """Whether a path leads to no other place than below where it begins."""
    return not path.startswith(("/", "~")) and ".." not in path.split("/")
