"""What can be generated with a recorded step, and what is left to transformers' own loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.configuration_utils import GenerationMode

from sparsity_atlas.lm.continuous.called import CACHE, arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_atlas.sparsify.attach import Counter

# Where a step can be recorded.
DEVICES = {"cuda"}
# Options of a task under which the likeliest token is taken as it is.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


def refusal(model: PreTrainedModel, counter: Counter, options: dict[str, Any]) -> str | None:
    """Why transformers' own loop is to generate, without a look at the model's numbers; None: it need not.

    Args:
        model: the model.
        counter: of what is attached to it.
        options: of a task, as lm-eval reads them.
    """
    if not counter.by_token:
        return "the criterion looks at more than the token in hand"
    if counter.by_expert.slots:
        return "tokens are counted by expert"
    return refusal_of_model(model) or _beyond_the_likeliest(model, options)


def refusal_of_model(model: PreTrainedModel) -> str | None:
    """Why no step of a model could be recorded, whatever is attached to it; None: it may be."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers lie on several devices"
    found = arguments(model)
    if not {"position_ids", "attention_mask"} <= found or not found & set(CACHE):
        return f"{type(model).__name__} takes no positions, mask, or cache"
    return None


def _beyond_the_likeliest(model: Any, options: dict[str, Any]) -> str | None:
    if unknown := sorted(options.keys() - _KNOWN):
        return f"generation_kwargs: {', '.join(unknown)}"
    if options.get("do_sample"):
        return "generation_kwargs: do_sample"
    # What the model's own configuration adds is transformers' to say.
    config, rest = model._prepare_generation_config(None, do_sample=False)
    model._prepare_special_tokens(config, True, device=model.device)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, device=str(model.device), model_kwargs=rest
    )
    if config.get_generation_mode() != GenerationMode.GREEDY_SEARCH:
        return f"it generates by {config.get_generation_mode()}"
    if processors:
        return ", ".join(type(one).__name__ for one in processors)
    return None
