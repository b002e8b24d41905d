"""Settings of generation that can be counted, and those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import TaskFailure

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from transformers import GenerationConfig

# With these, a row of the batch is no single text that grows by one token a pass.
_ONE = ("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale")
_NONE = (
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prefill_chunk_size",
    "custom_generate",
    # How long an answer becomes would depend on the machine.
    "max_time",
)
# What the pipeline itself passes to `generate`, and generation's own words for what lm-eval calls otherwise.
_OURS = {
    **dict.fromkeys(
        ("inputs", "input_ids", "attention_mask", "pad_token_id", "use_cache"), "leave it out"
    ),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "streamer"), "leave it out"),
    "stop_strings": "say until",
}


def check_options(
    request: Instance, options: dict[str, Any], defaults: GenerationConfig, max_length: int
) -> None:
    """Refuse settings under which it is not known what each token cost, or that leave no room.

    Args:
        request: one of those that are to be generated.
        options: of the task, as lm-eval reads them.
        defaults: of the model, which count where the task says nothing.
        max_length: of the model, in tokens.

    Raises:
        TaskFailure: names the key, where it stands, and what would do.
    """
    wanted = {**dict.fromkeys(_ONE, 1), **dict.fromkeys(_NONE), "use_mtp": False}
    for key, right in wanted.items():
        found = options.get(key, getattr(defaults, key, None))
        if found not in (None, right):
            where = "generation_kwargs" if key in options else "the model's generation_config.json"
            raise TaskFailure(
                f"'{request.task_name}': {where}: {key}: {found} found, only {right or 'none'} can be "
                f"counted; set it in generation_kwargs by the task's `override`"
            )
    for key, advice in _OURS.items():
        if key in options:
            raise TaskFailure(
                f"'{request.task_name}': generation_kwargs: {key}: it cannot be set here; {advice}"
            )
    stops = request.args[1].get("until", "")
    if not all(isinstance(one, str) for one in (stops if isinstance(stops, list) else [stops])):
        raise TaskFailure(
            f"'{request.task_name}': generation_kwargs: until: expected a text or a list of texts, "
            f"found {stops!r}"
        )
    room = options["max_gen_toks"]
    if room < 1:
        raise TaskFailure(
            f"'{request.task_name}': generation_kwargs: max_gen_toks: expected 1 or more, found {room}"
        )
    if room >= max_length:
        raise TaskFailure(
            f"'{request.task_name}': generation_kwargs: max_gen_toks: {room} tokens to generate "
            f"(256 where a task says nothing), and the model takes {max_length} with the prompt; set "
            f"fewer by the task's `override`, for instance {{generation_kwargs: {{until: ['\\n'], "
            f"max_gen_toks: {max(1, max_length // 4)}}}}}"
        )


class CacheWatch:
    """A hook of a model that generates: sees that after the prompt it is fed one token at a time.

    Where it is not, each step runs the whole text again, and what it costs is not that of a token.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._prompt = True

    def __call__(
        self, model: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Look at what the model is fed.

        Raises:
            TaskFailure: more than one token after the prompt.
        """
        fed = options.get("input_ids", arguments[0] if arguments else None)
        if fed is not None and not self._prompt and fed.shape[1] > 1:
            raise TaskFailure(
                f"'{self._task}': it generates, and this model keeps no keys and values from token to "
                "token, so that what it generates cannot be counted; take tasks that are scored"
            )
        self._prompt = False
