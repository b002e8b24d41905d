"""One layer's FFN, bound to the modules that compute its factors and its output.

Beside W_d(u ⊙ g) itself, three things that models do in between are known: bounds and offsets of a factor,
the cut of a gate's row (`Shaping`), and a norm of u ⊙ g. `intermediate` is what the down projection reads:
behind a norm that differs from u ⊙ g, and there are no sites `up` and `gate`, since a dropped entry of a
factor would change all others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import Activation
from sparsity_atlas.sites.forward_watch import ForwardWatch
from sparsity_atlas.sites.module_hooks import on_input, on_output
from sparsity_atlas.sites.part import Given, Observer, Rewriter, Vectors, within_one_output
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.sites.shaping import PLAIN, Shaping
from sparsity_atlas.terms import FFN as DENSE
from sparsity_atlas.terms import PROJECTED, TENSORS, PlaceKey, by_projection, confined, plain

# What W_u and W_g read: x, for both or for one of them.
_READ = ("input", *PROJECTED["input"])


@dataclass(frozen=True, eq=False)
class FFN:
    """One layer's FFN(x) = W_d(u ⊙ g) with u = W_u x, g = σ(W_g x); ungated: W_d σ(W_u x). A `Part`.

    Attributes:
        layer: index of the decoder's layer.
        hidden: entries of its input.
        width: entries of the factors.
        up: W_u.
        gate: W_g; None without one.
        activation: σ.
        down: W_d.
        model: whose layer it is.
        overwritten: the model computes in place: u or g are gone when the down projection runs.
        name: which part of the layer it is.
        shaping: what becomes of W_u x before it is u.
        norm: of u ⊙ g, before W_d.
        split: W_u and W_g read a tensor of their own each, see `Part.by_projection`.
    """

    layer: int
    hidden: int
    width: int
    up: Projection
    gate: Projection | None
    activation: Activation
    down: Projection
    model: nn.Module = field(repr=False)
    overwritten: bool = False
    name: str = DENSE
    shaping: Shaping = PLAIN
    norm: Projection | None = None
    split: bool = False

    @property
    def gated(self) -> bool:
        """Whether there are two factors."""
        return self.gate is not None

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `Part.tensors`."""
        read = PROJECTED["input"][: 2 if self.gated else 1] if self.split else ("input",)
        factors = ("up", "gate") if self.gated and self.norm is None else ()
        return (*read, *factors, "intermediate")

    @property
    def observable(self) -> tuple[str, ...]:
        """See `Part.observable`."""
        return self.tensors

    @property
    def paths(self) -> tuple[str, ...]:
        """See `Part.paths`."""
        maps = (self.down, self.up, self.gate, self.norm)
        return tuple(dict.fromkeys(place.path for place in maps if place is not None))

    def rows_are_tokens(self, tensor: str) -> bool:
        """See `Part.rows_are_tokens`."""
        return True

    def routing(self, tensor: str) -> None:
        """See `Part.routing`: they are not."""

    @property
    def experts(self) -> tuple[()]:
        """See `Part.experts`."""
        return ()

    def apart(self) -> Self:
        """See `Part.apart`: all rows meet the same weights."""
        return self

    def by_projection(self) -> Self:
        """See `Part.by_projection`.

        Raises:
            AtlasError: one module makes both factors.
        """
        if self.gate is not None and self.gate.path == self.up.path:
            raise AtlasError(f"layer {self.layer}: {self.up.path} makes both factors")
        return replace(self, split=True)

    def readers(self, tensor: str) -> tuple[Projection, ...]:
        """See `Part.readers`."""
        if tensor in PROJECTED["input"]:
            made_by = self.up if tensor == "up_input" else self.gate
            assert made_by is not None, "an FFN without a gate has no such tensor"
            return (made_by,)
        if tensor != "input":
            return (self.down,)
        return (self.up,) if self.gate is None else (self.up, self.gate)

    def size(self, tensor: str) -> int:
        """See `Part.size`."""
        return self.hidden if tensor in _READ else self.width

    def outputs(self, tensor: str) -> int:
        """See `Part.outputs`."""
        if tensor in PROJECTED["input"]:
            return self.width
        if tensor != "input":
            return self.hidden
        return 2 * self.width if self.gated else self.width

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Recompute both factors from the FFN's input, past all hooks.

        Args:
            x: [..., d].

        Returns:
            u and g, each [..., d_ff]; without a gate, W_u x (before the nonlinearity) and None.
        """
        # forward() and not the module itself: hooks see only what the model computes.
        output = self.up.module.forward(x)
        u = self.shaping(self.up.columns(output))
        if self.gate is None:
            return u, None
        if self.gate.module is not self.up.module:
            output = self.gate.module.forward(x)
        return u, self.activation(self.gate.columns(output))

    def intermediate(self, x: Tensor) -> Tensor:
        """The input [..., d_ff] of the down projection, recomputed from x [..., d]."""
        return self._read(self._product(*self.factors(x)))

    def _product(self, u: Tensor, g: Tensor | None) -> Tensor:
        return self.activation(u) if g is None else u * g

    def _read(self, product: Tensor) -> Tensor:
        """What the down projection reads."""
        return product if self.norm is None else self.norm(product)

    def recompute(self, given: Given, tensor: str) -> Tensor:
        """See `Part.recompute`."""
        x = given["input"].flatten(0, -2)
        if tensor in _READ:
            return x
        u, g = self.factors(x)
        if tensor == "gate" and g is not None:
            return g
        return u if tensor == "up" else self._read(self._product(u, g))

    def within(self, site: str) -> tuple[str, ...]:
        """See `Part.within`: whatever is dropped changes the one output."""
        own = within_one_output(plain(site))
        return tuple(confined(one, (), each=True) for one in own) if by_projection(site) else own

    def sources(self, site: str) -> tuple[str, ...]:
        """See `Part.sources`."""
        return ("input",)

    def run(self, given: Given, site: str, rewrite: Rewriter | None = None) -> Tensor:
        """See `Part.run`."""
        x = given["input"]
        if rewrite is None:
            return self.down(self.intermediate(x))

        def changed(name: str, read: Tensor, write: Tensor) -> Tensor:
            if name not in TENSORS[site] or name not in self.tensors:
                return write
            found = rewrite(Vectors(self, name, read), write)
            return write if found is None else found

        x = changed("input", x, x)
        for_up, for_gate = (changed(name, x, x) for name in PROJECTED["input"])
        u, g = self.factors(for_up)
        if g is not None and for_gate is not for_up:
            g = self.factors(for_gate)[1]
        # Dropping an entry of a factor drops the same entry of the product.
        i = changed("up", u, self._product(u, g))
        if g is not None:
            i = changed("gate", g, i)
        i = self._read(i)
        return self.down(changed("intermediate", i, i))

    def observe(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Observer) -> None:
        """See `Part.observe`."""

        def show(values: Tensor) -> None:
            act(Vectors(self, tensor, values))

        if tensor in (*_READ, "intermediate"):
            on_input(stack, forwards, self._key(tensor), self.readers(tensor), show)
        else:
            self._on_factor(stack, forwards, tensor, show)

    def rewrite(self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Rewriter) -> None:
        """See `Part.rewrite`; of u and g, the entries of u ⊙ g are replaced."""
        key = self._key(tensor)

        def change(values: Tensor) -> Tensor | None:
            return act(Vectors(self, tensor, values), values)

        if tensor in (*_READ, "intermediate"):
            on_input(stack, forwards, key, self.readers(tensor), change)
            return

        def keep(factor: Tensor) -> None:
            forwards.kept[key] = factor.clone() if self.overwritten else factor

        def write(i: Tensor) -> Tensor | None:
            factor = forwards.kept.pop(key, None)
            # A missing factor is reported, by name, at the end of the pass.
            return None if factor is None else act(Vectors(self, tensor, factor), i)

        self._on_factor(stack, forwards, tensor, keep)
        on_input(stack, forwards, self._key("intermediate"), (self.down,), write)

    def _on_factor(
        self, stack: ExitStack, forwards: ForwardWatch, tensor: str, act: Callable[[Tensor], None]
    ) -> None:
        """Hook where a factor is made: `act` sees u, or g after the nonlinearity, by token."""
        activation, key = self.activation, self._key(tensor)
        if tensor == "up":

            def factor(output: Tensor) -> Tensor:
                return self.shaping(self.up.columns(output))

            on_output(stack, forwards, key, self.up, factor, act)
        elif activation.module is not None:
            made = Projection(str(activation.path), activation.module)
            on_output(stack, forwards, key, made, made.columns, act)
        else:
            gate = self.gate
            assert gate is not None

            def value(output: Tensor) -> Tensor:
                return activation(gate.columns(output))

            on_output(stack, forwards, key, gate, value, act)

    def _key(self, tensor: str) -> PlaceKey:
        return PlaceKey(self.layer, self.name, tensor)

    def describe(self) -> dict[str, Any]:
        """See `Part.describe`."""

        def place(projection: Projection) -> dict[str, Any]:
            return {"module": projection.path, "half": projection.half}

        return {
            "layer": self.layer,
            "hidden": self.hidden,
            "width": self.width,
            "gated": self.gated,
            "up": place(self.up),
            "gate": place(self.gate) if self.gate is not None else None,
            "activation": {
                "name": self.activation.name,
                "module": self.activation.path,
                "shared": self.activation.path is not None and self.activation.module is None,
                **_unless_plain("before", self.activation.before),
            },
            "down": place(self.down),
            "overwritten": self.overwritten,
            # What a manifest of an earlier release has no name for is a dense FFN.
            **({} if self.name == DENSE else {"part": self.name}),
            **_unless_plain("shaping", self.shaping),
            **({} if self.norm is None else {"norm": self.norm.path}),
        }


def _unless_plain(key: str, shaping: Shaping) -> dict[str, Any]:
    return {} if shaping == PLAIN else {key: shaping.describe()}
