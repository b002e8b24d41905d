"""What the embedded models are: one table of sizes, one set of training settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsity_atlas.errors import AtlasError

HEAD_WIDTH = 32


@dataclass(frozen=True)
class Architecture:
    """One Llama-shaped model: gated FFN, rotary positions, RMSNorm, tied embeddings, no biases.

    `activation` is the name of the gate's nonlinearity as transformers spells it, or `drelu`, a ReLU on
    both factors; an FFN that is not `gated` is W_d σ(W_u x). The learning rate stands here because the
    best one falls as models widen.
    """

    width: int
    layers: int
    ffn_width: int
    learning_rate: float
    activation: str = "silu"
    gated: bool = True

    @property
    def heads(self) -> int:
        """Attention heads of `HEAD_WIDTH` channels each (no grouped queries)."""
        return self.width // HEAD_WIDTH

    @property
    def non_embedding_parameters(self) -> int:
        """Weights outside the token embedding: attention, FFN and norms."""
        maps = 3 if self.gated else 2
        per_layer = 4 * self.width**2 + maps * self.width * self.ffn_width + 2 * self.width
        return self.layers * per_layer + self.width


@dataclass(frozen=True, kw_only=True)
class Mixture(Architecture):
    """One OLMoE-shaped model: as `Architecture`, with experts in place of the FFN and normed q and k.

    `ffn_width` is that of one expert, of which each token meets `active_experts`. `balance` weighs
    the loss that asks for an even load.
    """

    experts: int
    active_experts: int
    balance: float = 0.01  # as in the configuration of OLMoE-1B-7B

    @property
    def non_embedding_parameters(self) -> int:
        """Weights outside the token embedding: attention, all experts, routers and norms."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those of `non_embedding_parameters` that serve one token."""
        return self._parameters(self.active_experts)

    def _parameters(self, experts: int) -> int:
        attention = 4 * self.width**2 + 2 * self.width
        routed = 3 * self.width * self.ffn_width * experts + self.width * self.experts
        return self.layers * (attention + routed + 2 * self.width) + self.width


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Architecture):
    """One Llama-shaped model in which each token sees all others, trained to fill masked tokens in.

    Of its sequences the share `short_texts` is cut into the short texts that it is mostly asked about.
    """

    short_texts: float = 0.25

    @staticmethod
    def mask_token(training: Training) -> int:
        """Id of the mask: the one after the tokenizer's last, since no token of a text is spare."""
        return training.vocab_size


_MEDIUM = Architecture(width=160, layers=5, ffn_width=448, learning_rate=6e-3)

ARCHITECTURES: dict[str, Architecture] = {
    "small": Architecture(width=96, layers=4, ffn_width=256, learning_rate=1e-2),
    "medium": _MEDIUM,
    "large": Architecture(width=256, layers=6, ffn_width=704, learning_rate=5e-3),
    # The positive control: exact zeros by its nonlinearity, all else as in `medium`.
    "medium-relu": replace(_MEDIUM, activation="relu"),
    # A token meets as much of it as of `medium`, and the whole is as large as `large`.
    "medium-moe": Mixture(
        width=160, layers=5, ffn_width=224, learning_rate=6e-3, experts=8, active_experts=2
    ),
    # Its weights are as many as those of `medium`, and it is trained on the same windows.
    "medium-diffusion": MaskedDiffusion(width=160, layers=5, ffn_width=448, learning_rate=6e-3),
    # So small that several checkpoints along its training can be kept.
    "tiny": Architecture(width=32, layers=2, ffn_width=112, learning_rate=1e-2),
}


@dataclass(frozen=True)
class Training:
    """Settings shared by all models. Lengths and batches are counted in predicted tokens."""

    steps: int = 16_384
    batch_tokens: int = 32_768
    seed: int = 0
    context: int = 512
    vocab_size: int = 4096
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AtlasError(f"--steps: found {self.steps}, expected at least 1")
        if self.batch_tokens < self.context or self.batch_tokens % self.context:
            raise AtlasError(
                f"--batch-tokens: found {self.batch_tokens}, "
                f"expected a multiple of the context length {self.context}"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of rising learning rate: 500, or a tenth of a shorter training."""
        return min(500, self.steps // 10)

    @property
    def sequences(self) -> int:
        """Sequences in a batch."""
        return self.batch_tokens // self.context

    @property
    def tokens(self) -> int:
        """Predicted tokens over the whole training."""
        return self.steps * self.batch_tokens


def architecture(name: str) -> Architecture:
    """Look a model up by name; AtlasError names the known ones."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise AtlasError(f"--model: found {name!r}, expected one of {known}")
    return ARCHITECTURES[name]


def described(facts: dict[str, Any]) -> Architecture:
    """The architecture whose fields `training.json` holds."""
    kinds: dict[str, type[Architecture]] = {"experts": Mixture, "short_texts": MaskedDiffusion}
    kind = next((found for name, found in kinds.items() if name in facts), Architecture)
    return kind(**facts)
