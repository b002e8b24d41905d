"""Has transformers list how it renames what is in checkpoints, once for all forks: loading a model asks."""

from __future__ import annotations

from transformers import conversion_mapping

conversion_mapping.get_checkpoint_conversion_mapping("llama")
