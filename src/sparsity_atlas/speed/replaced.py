"""A model's maps replaced, while it decodes, by products that leave out the weights which zeros meet.

Prompts stay dense: what is replaced is what one token of each row goes through. Which module computes a gated
FFN is found out by numbers: it is one that gives what the FFN's three maps give. Of an FFN that the products
do not know as a whole its maps are replaced one by one, where what they read is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsity_atlas.criteria.base import Criterion, keeps_by_threshold
from sparsity_atlas.decoding.backend import MOST_TOKENS
from sparsity_atlas.decoding.vector import LIKELY
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.models.logits.head import EXACT, ROUNDED
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.probe.hypotheses import relative_error
from sparsity_atlas.speed.products import READ, gated, joined, plain_weight
from sparsity_atlas.terms import TENSORS, PlaceKey, plain

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsity_atlas.decoding.maps import GatedFFN
    from sparsity_atlas.decoding.vector import Norm
    from sparsity_atlas.kernels.definition import Threshold
    from sparsity_atlas.sites.part import Part

# Rows that a module is tried with.
TRIED = 3
# Of what is likely dropped.
UNKNOWN: Mapping[PlaceKey, float] = MappingProxyType({})
Forward = Callable[..., "Tensor"]


@contextmanager
def replaced(
    model: nn.Module,
    parts: Sequence[Part],
    site: str,
    bound: Mapping[PlaceKey, Criterion],
    level: float,
    expected: Mapping[PlaceKey, float] = UNKNOWN,
) -> Iterator[Replaced]:
    """Within: tokens that are fed one by one go through sparse maps.

    Args:
        model: on a device that there are kernels for; on others all is computed the dense way.
        parts: of its own.
        site: where entries are dropped.
        bound: the rule of each place.
        level: of all of them.
        expected: share of each place's entries that is likely dropped, by which products are cut.

    Yields:
        What knows the rules in force, and takes others.

    Raises:
        AtlasError: a rule that is no threshold, or a map of a form that the products do not know.
    """
    with ExitStack() as stack:
        single = _Single()
        handle = model.register_forward_pre_hook(single, with_kwargs=True)
        stack.callback(handle.remove)
        found = Replaced(bound, level, expected)
        for part in parts:
            keys = {name: PlaceKey(part.layer, part.name, name) for name in TENSORS[plain(site)]}
            rules = {
                name: partial(found.rule, key, part.size(name))
                for name, key in keys.items()
                if key in bound
            }
            if rules:
                found.copies += _replace(stack, single, part, rules)
        yield found


class Replaced:
    """The rules that replaced maps go by.

    Attributes:
        copies: bytes of transposed copies.
    """

    def __init__(
        self,
        bound: Mapping[PlaceKey, Criterion],
        level: float,
        expected: Mapping[PlaceKey, float] = UNKNOWN,
    ) -> None:
        """As of `use`."""
        self.copies = 0
        self.use(bound, level, expected)

    def use(
        self,
        bound: Mapping[PlaceKey, Criterion],
        level: float,
        expected: Mapping[PlaceKey, float] = UNKNOWN,
    ) -> None:
        """Go by other rules at the same places from now on; a recorded step keeps its own.

        Raises:
            AtlasError: a rule that is no threshold.
        """
        for criterion in bound.values():
            if not keeps_by_threshold(criterion):
                name = type(criterion).__name__
                raise AtlasError(f"{name}: its masks follow from no threshold of a token")
        self._bound, self._level, self._expected = bound, level, expected
        self._known: dict[PlaceKey, Threshold] = {}

    def rule(self, place: PlaceKey, width: int, device: torch.device) -> InForce:
        """The rule of a place [width]."""
        if place not in self._known:
            self._known[place] = self._bound[place].threshold(self._level, width).to(device)
        return InForce(self._known[place], self._expected.get(place, LIKELY))


class _Single:
    """Whether the pass in hand is over one token of each row: a hook of the model."""

    def __init__(self) -> None:
        self._single = False

    def __call__(
        self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        ids = options.get("input_ids", arguments[0] if arguments else None)
        self._single = ids is not None and ids.shape[1] == 1 and len(ids) <= MOST_TOKENS

    def holds(self, x: Tensor) -> bool:
        """Whether x [..., width] are vectors of such a pass."""
        return self._single and x.shape[:-1].numel() <= MOST_TOKENS

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within: no pass is."""
        before, self._single = self._single, False
        try:
            yield
        finally:
            self._single = before


class InForce(NamedTuple):
    """A threshold, with its tensors on a device, and the share of entries that it likely drops."""

    threshold: Threshold
    expected: float


Rule = Callable[[torch.device], InForce]
Rules = Mapping[str, Rule]


def _replace(stack: ExitStack, single: _Single, part: Part, rules: Rules) -> int:
    """Replace what reads the tensors of a part; bytes of copies."""
    if isinstance(part, FFN) and part.gated:
        try:
            return _replace_ffn(stack, single, part, rules)
        except AtlasError:
            if not set(rules) <= set(READ):
                raise
    copies = 0
    for name, rule in rules.items():
        copies += _replace_readers(stack, single, part, name, rule)
    return copies


class Readers:
    """Maps that read one tensor, as one product, whose rows are those of all of them.

    Attributes:
        modules: of the maps, in the order of what is made.
        single: what says which passes they make.
    """

    def __init__(self, single: _Single, part: Part, name: str, rule: Rule) -> None:
        self.single, self._rule = single, rule
        self.product, readers, self._sizes = joined(part, name)
        self.modules: list[Any] = [reader.module for reader in readers.values()]
        self._waiting: dict[int, Tensor] = {}

    def made(self, place: int, x: Tensor) -> Tensor | None:
        """What one of the maps makes; None: this is no single token."""
        if not self.single.holds(x):
            return None
        if place not in self._waiting:
            made = self.product(x.flatten(0, -2), *self._rule(x.device)).split(self._sizes, -1)
            self._waiting.update(enumerate(made))
        return _like(self._waiting.pop(place), x)

    def after_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """x + more, and what the maps make of its norm; None where that takes two steps.

        Args:
            x: [rows, width].
            norm: of it.
        """
        found = None
        if self.single.holds(x[:, None]):
            found = self.product.after_norm(x, norm, *self._rule(x.device))
        return None if found is None else (found[0], found[1].split(self._sizes, -1))


class Reader:
    """The forward pass of one of `readers`."""

    def __init__(self, readers: Readers, place: int, own: Forward) -> None:
        self.readers, self._place, self._own = readers, place, own
        self.single = readers.single

    def __call__(self, x: Tensor) -> Tensor:
        found = self.readers.made(self._place, x)
        return self._own(x) if found is None else found


def _replace_readers(stack: ExitStack, single: _Single, part: Part, name: str, rule: Rule) -> int:
    """Replace maps that read one tensor by one product."""
    readers = Readers(single, part, name, rule)
    for place, module in enumerate(readers.modules):
        put(stack, module, Reader(readers, place, module.forward))
    return readers.product.copies


class SparseFFN:
    """The forward pass of an FFN."""

    def __init__(self, single: _Single, product: GatedFFN, rules: Rules, own: Forward) -> None:
        self.single, self._product, self._rules, self._own = single, product, rules, own

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not self.single.holds(x):
            return self._own(x, *arguments, **options)
        return _like(self._product(x.flatten(0, -2), *self._at(x)), x)

    def after_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor] | None:
        """As `Readers.after_norm`, of the whole FFN."""
        if not self.single.holds(x[:, None]):
            return None
        return self._product.after_norm(x, norm, *self._at(x))

    def _at(self, x: Tensor) -> tuple[dict[str, Threshold], dict[str, float]]:
        found = {name: rule(x.device) for name, rule in self._rules.items()}
        return (
            {name: one.threshold for name, one in found.items()},
            {name: one.expected for name, one in found.items()},
        )


def _replace_ffn(stack: ExitStack, single: _Single, part: FFN, rules: Rules) -> int:
    product = gated(part, tuple(rules))
    module = _module_of(part)
    put(stack, module, SparseFFN(single, product, rules, module.forward))
    return product.copies


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [tokens, width] in the form of x [rows, 1, ...]."""
    return rows.view(*x.shape[:-1], -1)


def _module_of(part: FFN) -> nn.Module:
    """The innermost module around an FFN's maps, which computes it and nothing else.

    Raises:
        AtlasError: it computes something else.
    """
    assert part.gate is not None
    paths = [place.path.split(".") for place in (part.up, part.gate, part.down)]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    module = part.model.get_submodule(".".join(common))
    weight = plain_weight(part.up)
    x = torch.randn(1, TRIED, part.hidden, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        wanted = part.down(part.intermediate(x))
        found: object = module.forward(x)
    allowed = EXACT if weight.dtype == torch.float32 else ROUNDED
    # Written so that NaN is wrong.
    if not (isinstance(found, torch.Tensor) and relative_error(wanted, found) <= allowed):
        raise AtlasError(f"{'.'.join(common)}: it computes more than the FFN of its three maps")
    return module


def has_replaced(model: nn.Module) -> bool:
    """Whether maps of a model are replaced."""
    return bool(_singles(model))


@contextmanager
def dense_meanwhile(model: nn.Module) -> Iterator[None]:
    """Within: maps that are replaced give what the model's own give."""
    with ExitStack() as stack:
        for single in _singles(model):
            stack.enter_context(single.off())
        yield


def _singles(model: nn.Module) -> list[_Single]:
    """Of each replacement of a model's maps what says which passes it makes."""
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return list({one.single: None for one in forwards if isinstance(one, SparseFFN | Reader)})


def put(stack: ExitStack, module: Any, forward: Forward) -> None:
    """Give a module another forward pass until a stack unwinds."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def back() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    stack.callback(back)
