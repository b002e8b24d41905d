"""Which class stands for a model of which kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.terms import CAUSAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity_atlas.lm.journalled import JournalledLM


def language_model(
    manifest: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    diffusion: dict[str, Any] | None = None,
    **options: Any,
) -> JournalledLM:
    """A loaded model as lm-eval sees it.

    Args:
        manifest: with the model's name and kind, and what a masked-diffusion model is asked with.
        model: see `PromptLM`.
        tokenizer: likewise.
        diffusion: how a masked-diffusion model is asked, as the model's entry says; None: by default.
        options: see `PromptLM`.

    Raises:
        AtlasError: such settings, of a causal model.
    """
    if manifest["kind"] == CAUSAL:
        from sparsity_atlas.lm.model import AtlasLM

        if diffusion is not None:
            raise AtlasError(
                f"models.{manifest['name']}: diffusion: it is for masked-diffusion models, and this one "
                "is causal; leave it out"
            )
        return AtlasLM(model, tokenizer, **options)
    from sparsity_atlas.config.model_entry import DiffusionSettings
    from sparsity_atlas.lm.masked.masked_lm import MaskedLM

    return MaskedLM(
        model,
        tokenizer,
        mask_token=manifest["mask_token_id"],
        shifted=manifest["shifted_logits"],
        diffusion=DiffusionSettings(**(diffusion or {})),
        **options,
    )
