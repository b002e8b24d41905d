"""How well a step of decoding with sparse maps agrees with the simulated criterion, token by token.

    python benchmarks/agreement.py
    python benchmarks/agreement.py --device cpu --model tiny

One step after each of some dense prompts, compared by log probabilities: the step as it is timed, of joined
layers and sparse products, against the model with the criterion attached; in float32, and in bfloat16 both
against float32. An entry that lies within the rounding of a sum of its threshold goes either way, and what it
changes moves others across theirs in the layers behind. So float32 steps are told apart: by whether there was
one, where thresholds are constants; where they are found, by whether all masks were the same. Random weights
of Llama's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama import SHAPES, random_llama
from measure import machine
from sparsity_atlas import kernels
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.find import find_parts
from sparsity_atlas.sparsify.attach import applied
from sparsity_atlas.speed.decoder import STEPS, Decoder
from sparsity_atlas.speed.replaced import replaced
from sparsity_atlas.speed.timed_rows import Constant
from tokens import FIND, captured

# Two layers as wide as Llama 3.1 8B's.
SHAPES["8b-2"] = (2, 4096, 14336, 32, 8, 32000)
# How near to a threshold, as a share of it; what float32 sums round is some of the first.
NEAR = (4e-6, 2e-5, 1e-4)
PROMPT = 40
# What no rounding of a sum explains, of log probabilities in float32.
FAR = 1e-4
# No vector is wider.
WIDEST = 2**15


class Run(NamedTuple):
    """What some steps gave.

    Attributes:
        logs: log probabilities, [steps, vocabulary].
        near: entries near thresholds that are constants, [steps, NEAR].
        masks: a number that is another one where another mask was found, [steps].
    """

    logs: Tensor
    near: Tensor
    masks: Tensor


class Fed:
    """Steps after some prompts, how many entries were near their thresholds, and which masks were found."""

    def __init__(self, device: str, vocabulary: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(10, vocabulary, (steps, PROMPT + 1), generator=generator).to(device)
        self._prompts, self._tokens = drawn[:, :PROMPT], drawn[:, PROMPT:]
        self._near = torch.zeros(len(NEAR), dtype=torch.int64, device=device)
        self._masks = torch.zeros(1, dtype=torch.int64, device=device)
        self._marks = torch.randint(2**40, (WIDEST,), generator=generator).to(device)

    def run(self, model: Any, around: Callable[[], Any], *, join: bool) -> Run:
        """Take the steps."""
        decoder = Decoder(model, 1, PROMPT + STEPS, join=join)
        own, logits, near, masks = kernels.masked, [], [], []
        # Prompts first, as the model is: what a recorded step reads is there within `around` alone.
        begun = [self._begun(decoder, prompt) for prompt in self._prompts]

        def watched(rule: Threshold, values: Tensor, onto: Tensor) -> kernels.Masked:
            if rule.constants is not None:
                apart = (values.abs() - rule.constants).abs()
                for place, share in enumerate(NEAR):
                    self._near[place] += (apart <= share * rule.constants).sum()
                return own(rule, values, onto)
            found = own(rule, values, onto)
            self._masks.mul_(3).add_(((found.out != 0) * self._marks[: values.shape[-1]]).sum())
            return found

        kernels.masked = watched
        try:
            with around():
                decoder._record()
                for before, token in zip(begun, self._tokens, strict=True):
                    for one, value in zip(_state(decoder), before, strict=True):
                        one.copy_(value)
                    decoder._step.read(0)
                    self._near.zero_()
                    self._masks.zero_()
                    decoder._step.tokens.copy_(token)
                    decoder._step.run()
                    logits.append(decoder._step.logits[0].float().clone())
                    near.append(self._near.clone())
                    masks.append(self._masks.clone())
        finally:
            kernels.masked = own
        return Run(torch.stack(logits).log_softmax(-1), torch.stack(near), torch.cat(masks))

    @staticmethod
    def _begun(decoder: Decoder, prompt: Tensor) -> list[Tensor]:
        """What a decoder has after a prompt."""
        decoder.prompt(prompt[None])
        return [one.clone() for one in _state(decoder)]


def _state(decoder: Decoder) -> list[Tensor]:
    """What a step begins with: the clock, lengths, keys and values."""
    step = decoder._step
    held = [one for layer in step.ring.layers for one in (layer.keys, layer.values)]
    return [step.ring.clock, step.lengths, *held]


def said(found: Tensor, wanted: Tensor) -> str:
    """How far log probabilities [steps, vocabulary] are apart."""
    if not len(found):
        return "no such step"
    apart = (found - wanted).abs()
    largest = apart.max(-1).values
    same = (found.argmax(-1) == wanted.argmax(-1)).sum()
    far = (largest > FAR).sum()
    return (
        f"{len(found)} steps, median {float(apart.median()):.1e}, largest of a step: median "
        f"{float(largest.median()):.1e}, most {float(largest.max()):.1e}, {int(far)} beyond {FAR:.0e}; "
        f"same likeliest token in {int(same)}"
    )


def main() -> None:
    """Print what is compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="8b-2", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--sites", nargs="+", default=["all_linear_inputs"])
    parser.add_argument("--ways", nargs="+", default=list(FIND), choices=list(FIND))
    parser.add_argument("--share", type=float, default=0.5)
    arguments = parser.parse_args()
    print(machine(arguments.device))
    make = partial(random_llama, arguments.model, arguments.device, max_position_embeddings=2048)
    low, full = make(dtype=torch.bfloat16), make(dtype=torch.float32)
    # The same numbers in both.
    full.load_state_dict({name: one.float() for name, one in low.state_dict().items()})
    fed = Fed(arguments.device, full.config.vocab_size, arguments.steps)
    dense = fed.run(full, contextlib.nullcontext, join=False).logs
    for model in (full, low):
        for join in (False, True):
            found = fed.run(model, contextlib.nullcontext, join=join).logs
            layers = "joined" if join else "its own"
            print(f"dense {model.dtype}, {layers} layers: {said(found, dense)}", flush=True)
    for site in arguments.sites:
        vectors = captured(low, find_parts(low), site)
        for way in arguments.ways:
            bound = {
                key: Constant(FIND[way](some, arguments.share)) for key, some in vectors.items()
            }
            runs = {}
            for model in (full, low):
                parts = find_parts(model)
                attached = partial(applied, model, parts, site, bound, arguments.share)
                sparse = partial(replaced, model, parts, site, bound, arguments.share)
                runs[model.dtype] = (
                    fed.run(model, attached, join=False),
                    fed.run(model, sparse, join=True),
                )
            wanted, found = runs[torch.float32]
            print(
                f"{site}, {way}, {arguments.share}: float32 sparse: {said(found.logs, wanted.logs)}"
            )
            for share, of in zip(NEAR, wanted.near.T, strict=True):
                if int(of.sum()):
                    print(f"  {int(of.sum())} entries within {share:.0e} of their thresholds")
                    _parted(found, wanted, of == 0, "without one", "with one")
            if int(wanted.masks.any()):
                same = found.masks == wanted.masks
                _parted(found, wanted, same, "of the same masks", "of other masks")
            simulated, found = runs[torch.bfloat16]
            print(f"  bfloat16 simulated, against float32: {said(simulated.logs, wanted.logs)}")
            print(
                f"  bfloat16 sparse, against float32: {said(found.logs, wanted.logs)}", flush=True
            )


def _parted(found: Run, wanted: Run, which: Tensor, some: str, others: str) -> None:
    for word, steps in ((some, which), (others, ~which)):
        print(f"    steps {word}: {said(found.logs[steps], wanted.logs[steps])}")


if __name__ == "__main__":
    main()
