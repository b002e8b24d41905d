"""Find the sites of any decoder: by structure, proved by experiment, without a table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import ACTIVATIONS
from sparsity_atlas.sites.attention import Attention
from sparsity_atlas.sites.block import layer_path
from sparsity_atlas.sites.descriptions import bind_parts, describe_parts
from sparsity_atlas.sites.experts.discovery import find_experts
from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.experts.routed import RoutedExperts
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.hooks import intercept, observe, observe_places, transform
from sparsity_atlas.sites.offloading import device_of
from sparsity_atlas.sites.part import Part, Vectors, having, sites_of
from sparsity_atlas.sites.probe.attention_probe import Layer, find_attention
from sparsity_atlas.sites.probe.ffn_probe import Search
from sparsity_atlas.sites.probe.layers import (
    SharedFFN,
    as_named,
    check_own_weights,
    check_run_once,
    not_found,
)
from sparsity_atlas.sites.probe.mixed_layers import (
    MixedLayer,
    check_nothing_beside,
    dense_layers,
    mixed_layers,
    unexplained,
)
from sparsity_atlas.sites.probe.naming import NamedFFN, expand
from sparsity_atlas.sites.probe.proof import prove, proves_attention
from sparsity_atlas.sites.probe.router_probe import routing_ffns
from sparsity_atlas.sites.probe.stream_probe import added_to_stream
from sparsity_atlas.terms import SITES, STORED, TENSORS

__all__ = [
    "SITES",
    "STORED",
    "TENSORS",
    "Part",
    "Vectors",
    "bind_parts",
    "describe_parts",
    "find_parts",
    "having",
    "intercept",
    "observe",
    "observe_places",
    "sites_of",
    "transform",
]

# Two sequences, so that a model that swaps batch and tokens is noticed.
PROBE_BATCH, PROBE_TOKENS = 2, 8


def find_parts(model: nn.Module, modules: dict[str, str] | None = None) -> list[Part]:
    """Find and prove what every layer holds beside its norms, by a few passes over a few random tokens.

    Args:
        model: a language model; called as model(ids), in its own type and on its device.
        modules: the user's naming, where the search fails: `down`, and `up` (with `gate`), or
            `gate_up` with `order`; `activation`. Module paths, {layer} for the layer's number.

    Returns:
        Layer by layer, in the order of execution: the attention, where every layer that has one shows it,
        the FFN or shared expert, and the routed experts. Of a layer without a part there is none; a layer's
        number is the decoder's.

    Raises:
        AtlasError: an FFN or experts that are not found or not proved.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise AtlasError(f"{type(model).__name__}: encoder-decoder models are not supported")
    named = expand(model, modules, layers) if modules else None
    shape = (PROBE_BATCH, PROBE_TOKENS)
    ids = random_ids(model, shape)
    run = forward_of(model, ids)
    with torch.no_grad(), _evaluating(model):
        routed = {one.path: one for one in find_experts(model, ids, partial(_forward, model))}
        if routed and named is not None:
            raise AtlasError(
                "modules: names the FFN of every layer; this model is a mixture of experts, whose parts are "
                "found without"
            )
        alone = None if sees_earlier_only(text) else forward_of(model, ids.reshape(-1, 1))
        probe = _Probe(model, named, routed, layers, _named_functions(text), run, shape, alone)
        try:
            return probe.parts(shaped=False)
        except SharedFFN:
            raise
        except AtlasError:
            # What bounds, shifts, cuts or norms do is looked for where it is needed only.
            return probe.parts(shaped=True)


@dataclass(frozen=True)
class _Probe:
    """One search for all parts of a model.

    Attributes:
        model: in evaluation mode.
        named: the user's naming.
        routed: the modules of experts, by path.
        layers: how many there are, if the configuration says.
        functions: names of functions that the configuration has.
        run: a forward pass.
        shape: sequences and tokens of it.
        alone: see `find_attention`.
    """

    model: nn.Module
    named: list[NamedFFN] | None
    routed: dict[str, RoutedExperts]
    layers: int | None
    functions: tuple[str, ...]
    run: Callable[..., Any]
    shape: tuple[int, int]
    alone: Callable[[], Any] | None

    def parts(self, *, shaped: bool) -> list[Part]:
        """See `find_parts`; `shaped`: see `Search`."""
        model, run = self.model, self.run
        with ExitStack() as stack:
            tokens = self.shape[0] * self.shape[1]
            search = Search(model, tokens, self.named, self.functions, self.routed, shaped)
            search.attach(stack)
            run()
        check_run_once(search.findings)
        # Layers that run again must not find their own keys in a cache.
        again = partial(run, use_cache=False) if _takes(model, "use_cache") else run
        if self.named is None:
            added_to_stream(model, search.findings, again)
        found = self._layers(search)
        check_own_weights(one.ffn for one in found if one.ffn is not None)
        ffns = [_bind(model, one, search) for one in found if one.ffn is not None]
        experts = [
            Experts(one.number, self.routed[one.experts], model)
            for one in found
            if one.experts is not None
        ]
        routers = routing_ffns(model, ffns, experts, again)
        ffns = prove([ffn for ffn in ffns if ffn.layer not in routers], run)
        for part in experts:
            if part.layer not in {ffn.layer for ffn in ffns}:
                check_nothing_beside(model, found[part.layer], search.findings)
        beside: list[Part] = [*ffns, *experts]
        attention = self._attention(found, beside, search)
        # A stable sort: of each layer its attention first, its experts last.
        return sorted([*attention, *beside], key=lambda part: part.layer)

    def _layers(self, search: Search) -> list[MixedLayer]:
        findings = search.findings
        if self.named is not None:
            own = as_named(findings, self.named)
            return [MixedLayer(number, "", one) for number, one in enumerate(own)]
        if self.routed:
            return mixed_layers(self.model, findings, self.routed, self.layers)
        return dense_layers(self.model, findings, self.layers)

    def _attention(
        self, found: list[MixedLayer], beside: list[Part], search: Search
    ) -> list[Attention]:
        """The attentions, if all layers that have one show it.

        Raises:
            AtlasError: a layer holds nothing that is proved, and something else.
        """
        known = {}
        for one in found:
            own = [path for part in beside if part.layer == one.number for path in part.paths]
            path = one.path or layer_path(one.number, beside)
            count = None if one.experts is None else self.routed[one.experts].count
            known[one.number] = Layer(path, frozenset(own), one.experts, count)
        attention, complete = find_attention(self.model, known, self.run, self.shape, self.alone)
        if not (attention and proves_attention(attention, self.run)):
            attention = []
        bare = unexplained(self.model, found, [one.layer for one in attention])
        if bare is not None and not self.routed:
            raise AtlasError(not_found(self.model, search.findings, self.layers))
        if bare is not None:
            raise AtlasError(
                f"{type(self.model).__name__}: layer {bare.number} ({bare.path}) holds 0 FFNs that a probe "
                "proves and 0 modules of experts, and its maps are neither all those of an attention nor "
                "those of a state-space mixer"
            )
        return attention if complete else []


def sees_earlier_only(config: Any) -> bool:
    """Whether tokens see none behind them, by a decoder's configuration: transformers reads `is_causal`."""
    return getattr(config, "is_causal", None) is not False


def forward_of(model: nn.Module, ids: torch.Tensor) -> Callable[..., Any]:
    """A forward pass of the model over some token ids [batch, tokens], without a cache."""
    parameters = signature(model.forward).parameters
    # A cache would only cost memory, and some architectures refuse to make one for few layers.
    options = {"use_cache": False} if "use_cache" in parameters else {}
    if "input_ids" in parameters:
        return partial(model, input_ids=ids, **options)
    return partial(model, ids, **options)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass takes an option, or any."""
    parameters = signature(model.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _forward(model: nn.Module, ids: torch.Tensor) -> Any:
    return forward_of(model, ids)()


def _bind(model: nn.Module, layer: MixedLayer, search: Search) -> FFN:
    entry = layer.ffn
    assert entry is not None, "only layers with an FFN are bound"
    activation = entry.activation
    if activation.path is not None and search.findings.calls[activation.path] > 1:
        activation = replace(activation, module=None)
    return FFN(
        layer=layer.number,
        hidden=entry.hidden,
        width=entry.width,
        up=entry.up,
        gate=entry.gate,
        activation=activation,
        down=entry.down,
        model=model,
        name=layer.name,
        shaping=entry.shaping,
        norm=entry.norm,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def random_ids(model: nn.Module, shape: tuple[int, int]) -> torch.Tensor:
    """Token ids [batch, tokens], the same at each call, without those that the config reserves."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    size = getattr(text, "vocab_size", None) or (embedding.num_embeddings if embedding else None)
    if size is None:
        raise AtlasError(f"{type(model).__name__}: no vocabulary size and no embedding to tell it")
    reserved: set[int] = set()
    for one in (config, text):
        for key, value in vars(one).items() if one is not None else ():
            if key.endswith(("_token_id", "_token_index")):
                reserved.update(value if isinstance(value, list | tuple) else (value,))
    usable = torch.tensor([i for i in range(min(size, 4096)) if i not in reserved] or [0])
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(usable), shape, generator=generator)
    return usable[choice].to(device_of(embedding or model))


def _named_functions(config: Any) -> tuple[str, ...]:
    """Activation functions that the config names anywhere: tried first, so that ties go to them."""
    values = vars(config).values() if config is not None else ()
    return tuple(value for value in values if isinstance(value, str) and value in ACTIVATIONS)
