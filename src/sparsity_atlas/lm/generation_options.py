"""Settings of generation that can be counted, and those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import TaskFailure

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from transformers import GenerationConfig

# With these, a row of the batch is no single text that grows token by token.
_ONE = ("num_beams", "num_beam_groups", "num_return_sequences")
_NONE = (
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "dola_layers",
    "constraints",
    "force_words_ids",
)


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
    for key, right in {**dict.fromkeys(_ONE, 1), **dict.fromkeys(_NONE)}.items():
        found = options.get(key, getattr(defaults, key, None))
        if found not in (None, right):
            where = "generation_kwargs" if key in options else "the model's generation_config.json"
            raise TaskFailure(
                f"'{request.task_name}': {where}: {key}: {found} found, only {right or 'none'} can be "
                f"counted; set it in generation_kwargs by the task's `override`"
            )
    wanted = options["max_gen_toks"]
    if not 0 < wanted < max_length:
        raise TaskFailure(
            f"'{request.task_name}': generation_kwargs: max_gen_toks: {wanted} tokens to generate "
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

    def __call__(self, model: torch.nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
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
