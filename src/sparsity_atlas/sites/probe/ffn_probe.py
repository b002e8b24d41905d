"""Search for FFNs by experiment: set the outputs of all linear maps and see what follows from them.

One forward pass runs in which the output of every linear-like module is replaced by random
numbers. A module is a down projection if its input equals u ⊙ σ(g), or σ(u), of the numbers put in
at modules before it; or, in a second pass where some layers show none so, if it is the norm of such a
product, or one whose factors are bounded, shifted or cut. No name of a module, class or model is looked at.
The numbers are spread over [-12, 12] and are different for each module, so functions that agree near zero are
told apart, a clipped product is noticed, and no two modules agree by accident, however the model was
initialised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import permutations
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_atlas.sites.activation import ACTIVATIONS, Activation, activation_function
from sparsity_atlas.sites.probe.hypotheses import (
    QUICK_COLUMNS,
    Call,
    Factor,
    Findings,
    Hypothesis,
    equal,
    relative_error,
    tolerance,
)
from sparsity_atlas.sites.probe.naming import NamedFFN
from sparsity_atlas.sites.probe.shaped import shapings
from sparsity_atlas.sites.projection import Projection

# Linear maps between an FFN's up and down projection, with room for attention in parallel.
WINDOW = 16
# What modules that stand in for a linear one call its sizes.
_FEATURES = ("in_features", "out_features")
SPREAD = 12.0


def linear_like(model: nn.Module, apart: Collection[str] = ()) -> dict[str, nn.Module]:
    """Modules that may be a linear map: the outermost with a 2-D floating `weight`, and leaves
    that hold a 2-D floating tensor under another name, or packed ones that say how many features go in and
    out. Embeddings are told apart by their input.

    Args:
        model: the model.
        apart: paths of modules that are something else: experts, which may have 2-D biases.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        if path in apart:
            return
        own = [getattr(module, "weight", None)]
        children = dict(module.named_children())
        if not children:
            own += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        packed = not children and all(hasattr(module, name) for name in _FEATURES)
        if path and (packed or any(_is_matrix(tensor) for tensor in own)):
            found[path] = module
            return
        for name, child in children.items():
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def _is_matrix(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.is_floating_point()


class Search:
    """Hooks for one forward pass over `tokens` tokens; results in `findings`.

    Args:
        model: in evaluation mode.
        tokens: number of tokens that will go in.
        named: the user's own naming: only these modules are considered, in these roles.
        preferred: names of functions to try first (the configuration's own).
        apart: paths of modules of experts, which are none of the linear maps.
        shaped: whether to look for norms, bounds, offsets and cuts as well.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: int,
        named: list[NamedFFN] | None = None,
        preferred: tuple[str, ...] = (),
        apart: Collection[str] = (),
        shaped: bool = False,
    ) -> None:
        self.shaped = shaped
        self.model = model
        self.tokens = tokens
        self.apart = apart
        self.named = {entry.down: entry for entry in named} if named is not None else None
        self.functions = {
            name: activation_function(name) for name in dict.fromkeys((*preferred, *ACTIVATIONS))
        }
        self.linears: deque[Call] = deque(maxlen=WINDOW)
        self.activations: deque[Call] = deque(maxlen=WINDOW)
        self.findings = Findings()
        self.generator = torch.Generator().manual_seed(0)
        self.inputs: dict[str, Tensor] = {}
        self.paths = {path for path, _ in model.named_modules()}

    def attach(self, stack: ExitStack) -> None:
        """Register the hooks; they go when the stack closes."""
        if self.named is None:
            linears = linear_like(self.model, self.apart)
        else:
            paths = {path for entry in self.named.values() for path in entry.paths()}
            linears = {path: self.model.get_submodule(path) for path in paths}
        named = {entry.activation for entry in (self.named or {}).values()}
        # Modules that stand at several places are hooked once, under their first name.
        leaves = {
            path: module
            for path, module in self.model.named_modules()
            if (not any(module.children()) or path in named) and path not in linears
        }
        for modules, after in ((linears, self._after_linear), (leaves, self._after_leaf)):
            for path, module in modules.items():
                self._hook(stack, path, module, after)

    def _hook(self, stack: ExitStack, path: str, module: nn.Module, after: Any) -> None:
        def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.inputs.pop(path, None)
            # A function of two tensors is no activation.
            alone = after != self._after_leaf or len(tensors) == 1
            if tensors and alone and self._fits(tensors[0]):
                # A copy: the model may go on to compute in place.
                self.inputs[path] = tensors[0].flatten(0, -2).clone()

        def after_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.findings.calls[path] += 1
            given = self.inputs.pop(path, None)
            if given is None or not isinstance(output, Tensor) or not self._fits(output):
                return None
            return after(path, module, given, output)

        stack.callback(module.register_forward_pre_hook(before_call, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after_call).remove)

    def _fits(self, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point()
            and tensor.dim() >= 2
            and tensor.numel() == self.tokens * tensor.shape[-1]
        )

    def _after_linear(self, path: str, module: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        self._match(path, module, given, output.shape[-1])
        random = torch.rand(output.shape, generator=self.generator) * (2 * SPREAD) - SPREAD
        # To the device and type that the model computes in; and a copy, as above.
        random = random.to(output)
        # One tensor for one value: projections of the same x are told by identity later.
        given = next((call.input for call in self.linears if equal(call.input, given)), given)
        self.linears.append(Call(path, module, given, random.flatten(0, -2).clone()))
        return random

    def _after_leaf(self, path: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        flat = output.flatten(0, -2)
        # Dropout and other identities are not an activation.
        if flat.shape == given.shape and not equal(flat, given):
            self.activations.append(Call(path, module, given, flat.clone()))

    def _match(self, path: str, module: nn.Module, i: Tensor, hidden: int) -> None:
        """Look for factors of i among the calls so far."""
        found = list(self._readings(path, module, i, hidden))
        if self.shaped and not _proved(found):
            found += self._norms(path, module, i, hidden)
        if self.shaped and not _proved(found):
            found += self._shaped(path, module, i, hidden)
        if proved := _proved(found):
            # Of equals the first: the model's own activation module comes before a function.
            self.findings.proved.append(min(proved, key=lambda hypothesis: hypothesis.error))
        elif found:
            self.findings.closest.append(min(found, key=lambda hypothesis: hypothesis.error))

    def _readings(
        self, path: str, module: nn.Module, i: Tensor, hidden: int
    ) -> Iterator[Hypothesis]:
        """Ways to read i as u ⊙ σ(g) or σ(u), with their errors."""
        for up, gate in self._candidates(path, i, hidden):
            limit = tolerance(up.output.dtype)
            source = gate or up
            for activation, value, rough in self._activations(path, i, up, source):
                if rough > limit:
                    error = rough
                elif not _is_elementwise(activation, source.output):
                    error = inf
                else:
                    product = value() if gate is None else up.output * value()
                    error = relative_error(i, product)
                yield Hypothesis(
                    down=Projection(path, module),
                    up=up.projection,
                    gate=gate.projection if gate is not None else None,
                    activation=activation,
                    hidden=hidden,
                    width=i.shape[-1],
                    error=error,
                    limit=limit,
                )

    def _norms(self, path: str, module: nn.Module, i: Tensor, hidden: int) -> Iterator[Hypothesis]:
        """The same of what a module read that made i of it."""
        for call in reversed(self.activations):
            if equal(call.output, i):
                norm = Projection(call.path, call.module)
                for one in self._readings(path, module, call.input, hidden):
                    yield replace(one, norm=norm)

    def _shaped(self, path: str, module: nn.Module, i: Tensor, hidden: int) -> Iterator[Hypothesis]:
        """Ways to read i as a product of two factors that are bounded, shifted or cut."""
        if self.named is not None and path not in self.named:
            return
        named = self.named[path].activation if self.named is not None else None
        calls = [call for call in reversed(self.activations) if named in (None, call.path)]
        functions = self.functions
        if named is not None:
            functions = {} if named in self.paths else {named: activation_function(named)}
        for up, gate in self._candidates(path, i, hidden):
            if gate is None:
                continue
            for activation, shaping in shapings(i, up.output, gate.output, functions, calls):
                elementwise = _is_elementwise(activation, gate.output)
                product = shaping(up.output) * activation(gate.output)
                yield Hypothesis(
                    down=Projection(path, module),
                    up=up.projection,
                    gate=gate.projection,
                    activation=activation,
                    hidden=hidden,
                    width=i.shape[-1],
                    error=relative_error(i, product) if elementwise else inf,
                    limit=tolerance(up.output.dtype),
                    shaping=shaping,
                )

    def _candidates(
        self, down: str, i: Tensor, hidden: int
    ) -> Iterator[tuple[Factor, Factor | None]]:
        """Pairs (up, gate) that could be the factors of i by their shapes and inputs."""
        named = self.named.get(down) if self.named is not None else None
        if self.named is not None and named is None:
            return
        width = i.shape[-1]
        calls = [
            call
            for call in reversed(self.linears)
            if call.input.shape[-1] == hidden and call.output.device == i.device
        ]
        wholes = [call.factor(None) for call in calls if call.output.shape[-1] == width]
        fused = [call for call in calls if call.output.shape[-1] == 2 * width]
        for up in wholes:
            if named is None or named.is_ungated(up.path):
                yield up, None
        for call in fused:
            for gate_half in (0, 1):
                if named is None or named.is_fused(call.path, gate_half):
                    yield call.factor(1 - gate_half), call.factor(gate_half)
        for up, gate in permutations(wholes, 2):
            asked = named is None or named.is_gated(up.path, gate.path)
            if asked and up.input is gate.input:
                yield up, gate

    def _activations(
        self, down: str, i: Tensor, up: Factor, source: Factor
    ) -> Iterator[tuple[Activation, Callable[[], Tensor], float]]:
        """Nonlinearities that could have been applied to the output of `source`.

        Yields:
            The activation, its value as a function, and its relative error on the first columns.
        """
        named = self.named[down].activation if self.named is not None else None
        for call in reversed(self.activations):
            asked = named is None or named == call.path
            if asked and equal(call.input, source.output):
                activation = Activation(call.path, call.module.forward, call.path, call.module)
                yield activation, partial(getattr, call, "output"), 0.0
        functions = self.functions
        if named is not None:
            functions = {} if named in self.paths else {named: activation_function(named)}
        if not functions:
            return
        values = source.quick_values(functions)
        products = values if source is up else up.output[:, :QUICK_COLUMNS] * values
        few = i[:, :QUICK_COLUMNS].float()
        errors = torch.linalg.vector_norm(products.float() - few, dim=(1, 2))
        errors = errors / torch.linalg.vector_norm(few).clamp_min(1e-30)
        # A layout that fails is reported with its best function only.
        best = errors.nan_to_num(torch.inf).min().item()
        for (name, function), error in zip(functions.items(), errors.tolist(), strict=True):
            if error <= tolerance(source.output.dtype) or error == best:
                yield Activation(name, function), partial(function, source.output), error


def _proved(found: list[Hypothesis]) -> list[Hypothesis]:
    return [one for one in found if one.error <= one.limit]


def _is_elementwise(activation: Activation, before: Tensor) -> bool:
    """Whether each output depends on its own input only: a normalisation's does not."""
    if activation.path is None:
        return True
    changed = before.clone()
    changed[:, ::2] = changed[:, ::2].flip(0) + 1
    kept = slice(1, None, 2)
    expected = activation.function(before)[:, kept]
    return relative_error(expected, activation.function(changed)[:, kept]) <= tolerance(
        before.dtype
    )
