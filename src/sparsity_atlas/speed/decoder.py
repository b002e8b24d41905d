"""A model that decodes: its own maps or sparse ones, a ring of keys and values, and one recorded step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sparsity_atlas import cli
from sparsity_atlas.decoding.trial import Time, rounds_of
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.lm.continuous.called import Called
from sparsity_atlas.lm.continuous.recorded_step import Step, prompt_columns
from sparsity_atlas.lm.forward import Masks
from sparsity_atlas.models.logits.head import EXACT, ROUNDED
from sparsity_atlas.sites.probe.hypotheses import relative_error
from sparsity_atlas.speed.attached import Unchanged, attached
from sparsity_atlas.speed.joined import Known, joined
from sparsity_atlas.speed.replaced import has_replaced

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Steps that are one round of a measurement, and rounds.
STEPS, ROUNDS = 16, 20
# How often as far as one rounding of what each layer reads moves them, logits of joined layers may be from
# the model's own: a layer rounds some ten times in a row, and sums in another order. Never beyond MOST.
ROUNDINGS, MOST = 16, 0.5


class Decoder:
    """Rows that begin together and go on by their likeliest tokens.

    What is attached to the model, or replaced in it, when the first step runs is part of all of them, until
    `changed` is called.

    Attributes:
        joined: layers whose small steps are joined in the recorded step; 0 while none is recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        size: int,
        *,
        masks: Masks = Masks.ONE,
        join: bool = True,
    ) -> None:
        """Make room.

        Args:
            model: the model.
            rows: that are decoded together.
            size: tokens of a row at most, prompt and text.
            masks: how the model is told who sees whom.
            join: on a GPU, join the small steps of layers for which that is right (see `joined`), unless a
                whole step, of the model as it is, turns out to be another one than that of its own layers.
        """
        self._model, self._join, self.joined = model, join, 0
        self._called = Called(model)
        self._step = Step(self._called, None, rows, size, masks, STEPS)
        self._recorded = False
        self._held: list[Any] = []
        self._tried = False
        self._known: Known = Unchanged()

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """Run prompts of one length [rows, tokens]; returns the token that follows each, [rows]."""
        step, device = self._step, self._called.device
        rows, longest = ids.shape
        valid = torch.ones_like(ids, dtype=torch.bool)
        clock = int(step.ring.clock)
        columns = torch.from_numpy(prompt_columns(clock, longest, step.ring.size)).to(device)
        positions = torch.arange(longest, device=device).expand(rows, -1)
        with step.ring.prompts(torch.arange(rows, device=device), columns, valid):
            logits = self._called.next_logits(ids, positions, valid, step.ring)
        step.tokens.copy_(logits.argmax(-1))
        step.lengths.fill_(longest + 1)
        return step.tokens.clone()

    def go_on(self, steps: int) -> torch.Tensor:
        """The next tokens of all rows, int64 [steps, rows].

        Raises:
            AtlasError: on a GPU a step has to wait for the host.
        """
        self._record()
        made = []
        for begin in range(0, steps, STEPS):
            some = min(STEPS, steps - begin)
            for _ in range(some):
                self._step.run()
            made.append(torch.from_numpy(self._step.read(some)().tokens.copy()))
        return torch.cat(made)

    def timed(
        self, context: int, rounds: int = ROUNDS, steps: int = STEPS, longest: float = math.inf
    ) -> Time:
        """Time of a step, and all is as before.

        Each round is over the same tokens: those that would follow in any case, since texts that go on by
        their likeliest tokens for long come to repeat themselves.

        Args:
            context: tokens that each row has when it begins.
            rounds: at most, two at the least.
            steps: of each, `STEPS` at most.
            longest: seconds of all rounds, as `rounds_of` counts them.

        Raises:
            AtlasError: as of `go_on`.
        """
        self._record()
        took = []
        for _ in rounds_of(rounds, longest):
            with self._as_before():
                self._step.lengths.fill_(context)
                took.append(self._seconds(self._called.device, steps))
        return Time.of(took, steps)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Put back afterwards what steps within change."""
        step = self._step
        state = step.ring.clock, step.tokens, step.lengths
        before = [one.clone() for one in state]
        yield
        for one, value in zip(state, before, strict=True):
            one.copy_(value)
        step.read(0)

    def changed(self) -> None:
        """Say that another thing is attached to the model, or replaced in it, from the next step on."""
        self._recorded = False
        self._held.clear()
        self._step.forget()

    def _seconds(self, device: torch.device, steps: int) -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                self._step.run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        # As `trial.timed`: one thread's own time hardly feels other work.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begun = clock()
        for _ in range(steps):
            self._step.run()
        return clock() - begun

    def _record(self) -> None:
        if not self._recorded and records(self._called.device):
            # Of zeros that a rounding brings about or takes away no bound is known.
            if self._join and not self._tried and not has_replaced(self._model):
                self._record_what_is_right()
            else:
                self._record_step()
        self._recorded = True

    def _record_step(self) -> None:
        with joined(self._model, self._known) if self._join else nullcontext(0) as self.joined:
            # A recorded step knows addresses: what has tensors there must not go before the step does.
            self._held = attached(self._model)
            try:
                self._step.record()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = (str(error).splitlines() or [""])[0].partition(". ")[0]
                raise AtlasError(f"a step of it cannot be recorded on a GPU: {why}") from error

    def _record_what_is_right(self) -> None:
        """Record joined layers if a step of them is the model's own but for rounding, else its own."""
        own = self._logits()
        with _rounded_once_more(self._model):
            explained = relative_error(own, self._logits())
        self._record_step()
        error = relative_error(own, self._logits())
        least = EXACT if own.dtype == torch.float32 else ROUNDED
        allowed = min(max(least, ROUNDINGS * explained), MOST)
        self._tried = True
        # Written so that NaN is wrong.
        if not error <= allowed:
            cli.logger.warning(
                "joined layers give other logits than the model's own: relative error %.2g, allowed %.2g; "
                "its own layers are timed",
                *(error, allowed),
            )
            self._join = False
            self.changed()
            self._record_step()

    def _logits(self) -> torch.Tensor:
        """Of one step, [rows, vocabulary]; all is as before."""
        with self._as_before():
            self._step.run()
            return self._step.logits.clone()


@contextmanager
def _rounded_once_more(model: PreTrainedModel) -> Iterator[None]:
    """Within: what each layer reads is off by a rounding of its type, up or down by chance."""
    generator = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments:
            return arguments  # called by names: no layer that is joined
        x, *others = arguments
        signs = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
        return (x + x * signs * torch.finfo(x.dtype).eps, *others)

    with ExitStack() as stack:
        for layer in getattr(model.get_decoder(), "layers", ()):
            stack.callback(layer.register_forward_pre_hook(move).remove)
        yield


def records(device: torch.device) -> bool:
    """Whether steps are recorded on a device."""
    return device.type == "cuda"
