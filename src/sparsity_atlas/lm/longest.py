"""Models whose numbers for a sequence follow the longest one of its batch, or the longest one so far.

Some rotary embeddings choose their frequencies by the longest position of a forward pass: longrope, as
in the Phi-3 family, takes one of two sets; dynamic NTK grows them, and keeps what it grew until a short
pass comes. What such a model says of a request depends on its batch and on the batches before it, which
are therefore those of lm-eval (`collate`), each beginning in the state that lm-eval's would find.

A configuration declares the lengths at which that happens; what code of a repository does at which length
nobody knows, so that it is tried at every length that comes up.

That state stands in tensors and numbers of modules beside the parameters. It is read after every batch
and kept with the batch's answers, so that a run that goes on from a journal goes on in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.lm.forward import before_head
from sparsity_atlas.sites.probe.hypotheses import relative_error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Tokens whose numbers are looked at, at most; and the shortest length that a declaration can mean.
FEW, SHORTEST = 64, 16
# Relative error of hidden states that rounding explains in float32; in 16 bits that of a pass within the
# declared lengths is the measure, and this multiple of it too much.
EXACT, SUSPICIOUS = 1e-5, 4
_LENGTH = re.compile(r"position|seq|context|^n_ctx$|model_max_length")

# By module, by attribute.
Memory = dict[str, dict[str, Any]]


def declared_lengths(config: dict[str, Any]) -> set[int]:
    """Numbers of positions that a model's configuration names, at any depth."""
    found = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= declared_lengths(value)
        elif isinstance(value, int) and value >= SHORTEST and _LENGTH.search(str(key)):
            found.add(value)
    return found


class Lengths:
    """What a model remembers of the lengths of sequences.

    Attributes:
        declared: lengths that its configuration names, and requests may exceed.
        watched: whether there is any length that may matter.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        """Look at a model that has run nothing yet, which may be asked for up to `max_length` tokens."""
        self._model = model
        self.declared = {n for n in declared_lengths(model.config.to_dict()) if n < max_length}
        self._own_code = model.is_custom_code()
        self.watched = bool(self.declared) or self._own_code
        # Only where it may be needed: some models keep large tables there.
        self._fresh = _memory(dict(model.named_modules())) if self.watched else {}
        self._remembering: dict[str, nn.Module] = {}
        self._steady = 0  # longest sequence that was seen to change nothing
        self._follows = False

    def crossed(self, reach: int) -> bool:
        """Whether sequences of up to `reach` tokens exceed any length that may matter."""
        return self._own_code or any(reach > length for length in self.declared)

    def followed(self, tokens: list[int], reach: int) -> bool:
        """Whether what the model says of a sequence depends on others of up to `reach` tokens.

        A few tokens are run by themselves and at the beginning of a long sequence.

        Args:
            tokens: of a request.
            reach: of the longest sequence of the task.

        Raises:
            AtlasError: it remembers a long sequence where its state cannot be found.
            TaskFailure: it does not run so many tokens.
        """
        if not self.crossed(reach):
            return False
        if not self._follows and reach > self._steady:
            self._follows = self._prove((tokens * (reach // len(tokens) + 1))[:reach])
            if not self._follows:
                self._steady = reach
        return self._follows

    def _prove(self, long: list[int]) -> bool:
        declared = [length for length in self.declared if length < len(long)]
        few = min([FEW, *(length // 2 for length in declared)])
        if not declared:
            few = max(1, min(few, len(long) // 4))
        # Exceeds no length that is known.
        allowed = min(declared, default=few + 1)
        short, half = long[:few], long[: len(long) // 2 + 1]
        modules = dict(self._model.named_modules())
        alone = self._hidden(short, few)
        # How far rounding alone goes.
        within = self._hidden(long[:allowed], few)
        halfway = [] if declared else [self._hidden(half, few)]
        before = _memory(modules)
        try:
            beyond = self._hidden(long, few)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise TaskFailure(
                f"max_length: the model does not run {len(long)} tokens, {allowed} may be all that it can "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            ) from None
        # Of what changes with a length, and not with the first pass of all, a module's whole state is
        # kept.
        changed = {
            name
            for name, values in _memory(modules).items()
            if not _same(values, before.get(name, {}))
        }
        self._remembering = {name: modules[name] for name in sorted(changed)}
        halfway += [] if declared else [self._hidden(half, few)]
        self.restore({})
        again = relative_error(alone, self._hidden(short, few))
        self.restore({})
        if not torch.isfinite(alone).all():
            return bool(changed)  # which an evaluation reports
        rounding = EXACT
        if self._model.dtype != torch.float32:
            rounding = max(EXACT, SUSPICIOUS * relative_error(alone, within))
            if not declared:
                # The shapes are nearly the same.
                rounding = max(rounding, SUSPICIOUS * torch.finfo(self._model.dtype).eps)
        if not again <= rounding:
            most = f": max_length: at most {allowed} can be evaluated" if declared else ""
            raise AtlasError(
                "the model remembers the longest sequence that it has seen, where its state cannot be "
                f"found{most}"
            )
        # Written so that NaN follows: lm-eval's batches are right for any model.
        same = all(relative_error(alone, one) <= rounding for one in (beyond, *halfway))
        # Code of its own often keeps tables that only grow, which was tried: halfway, before and after.
        return not same or (bool(changed) and bool(declared))

    def _hidden(self, ids: list[int], few: int) -> Tensor:
        """What the head gets for the first few of some tokens, [few, hidden]."""
        with torch.no_grad():
            every = before_head(self._model, torch.tensor([ids], device=self._model.device))
        return every.reshape(-1, every.shape[-1])[:few].clone()

    def state(self) -> Memory:
        """What it remembers now, as JSON has it; empty if nothing but what it began with."""
        return {
            name: {key: _written(value) for key, value in values.items()}
            for name, values in _memory(self._remembering).items()
            if not _same(values, self._fresh.get(name, {}))
        }

    def restore(self, state: Memory) -> None:
        """Let it remember a `state`, as `state` gives it; an empty one is what it began with."""
        for name, module in self._remembering.items():
            fresh = self._fresh.get(name, {})
            written = state.get(name)
            values = fresh if written is None else {k: _read(v) for k, v in written.items()}
            for key in set(dict(_attributes(module))) - set(values):
                module._buffers.pop(key, None)
                module.__dict__.pop(key, None)
            for key, value in values.items():
                # Never in place: transformers keeps one tensor under two names.
                own = value.to(self._model.device, copy=True) if torch.is_tensor(value) else value
                if key in module._buffers or (key not in module.__dict__ and torch.is_tensor(own)):
                    module._buffers[key] = own
                else:
                    module.__dict__[key] = own


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own tensors and numbers, without its parameters."""
    for name, value in [*module.__dict__.items(), *module._buffers.items()]:
        if torch.is_tensor(value) or (isinstance(value, int | float) and name != "training"):
            yield name, value


def _memory(modules: dict[str, nn.Module]) -> Memory:
    found = {
        name: {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in _attributes(module)
        }
        for name, module in modules.items()
    }
    return {name: values for name, values in found.items() if values}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key])
        if torch.is_tensor(value) and torch.is_tensor(other[key])
        else not torch.is_tensor(other[key]) and value == other[key]
        for key, value in one.items()
    )


def _written(value: Any) -> Any:
    if not torch.is_tensor(value):
        return value
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
