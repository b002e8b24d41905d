"""Find the sites of any decoder: by structure, proved by experiment, without a table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.activation import ACTIVATIONS, Activation
from sparsity_atlas.sites.descriptions import bind_parts, describe_parts
from sparsity_atlas.sites.experts.discovery import find_experts
from sparsity_atlas.sites.experts.mixture import Experts
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sites.hooks import intercept, observe, observe_places, transform
from sparsity_atlas.sites.offloading import device_of
from sparsity_atlas.sites.part import Part, Vectors, having, sites_of
from sparsity_atlas.sites.probe.attention_probe import find_attention
from sparsity_atlas.sites.probe.ffn_probe import Search
from sparsity_atlas.sites.probe.hypotheses import Hypothesis
from sparsity_atlas.sites.probe.layers import as_named, check_run_once, one_a_layer
from sparsity_atlas.sites.probe.mixed_layers import (
    MixedLayer,
    check_nothing_beside,
    mixed_layers,
)
from sparsity_atlas.sites.probe.naming import expand
from sparsity_atlas.sites.probe.proof import prove, proves_attention
from sparsity_atlas.sites.probe.router_probe import routing_ffns
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
        Layer by layer, in the order of execution: the attention, where every layer shows one, the FFN or
        shared expert, and the routed experts.

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
        with ExitStack() as stack:
            search = Search(model, ids.numel(), named, _named_functions(text), routed)
            search.attach(stack)
            run()
        check_run_once(search.findings)
        if named is not None:
            found = [MixedLayer("", one, None) for one in as_named(search.findings, named)]
        elif routed:
            found = mixed_layers(model, search.findings, routed, layers)
        else:
            found = [
                MixedLayer("", one, None) for one in one_a_layer(model, search.findings, layers)
            ]
        ffns = [
            _bind(model, layer, search, one.ffn, one.name)
            for layer, one in enumerate(found)
            if one.ffn is not None
        ]
        experts = [
            Experts(layer, routed[one.experts], model)
            for layer, one in enumerate(found)
            if one.experts is not None
        ]
        # Layers that run again must not find their own keys in a cache.
        routers = routing_ffns(model, ffns, experts, lambda: run(use_cache=False))
        ffns = prove([ffn for ffn in ffns if ffn.layer not in routers], run)
        for part in experts:
            if part.layer not in {ffn.layer for ffn in ffns}:
                check_nothing_beside(model, found[part.layer], search.findings)
        routes = {path: one.count for path, one in routed.items()}
        beside: list[Part] = [*ffns, *experts]
        alone = None if sees_earlier_only(text) else forward_of(model, ids.reshape(-1, 1))
        attention = find_attention(model, beside, run, shape, routes, alone)
        if attention is None or not proves_attention(attention, run):
            attention = []
        # A stable sort: of each layer its attention first, its experts last.
        return sorted([*attention, *beside], key=lambda part: part.layer)


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


def _forward(model: nn.Module, ids: torch.Tensor) -> Any:
    return forward_of(model, ids)()


def _bind(model: nn.Module, layer: int, search: Search, entry: Hypothesis, name: str) -> FFN:
    activation = entry.activation
    if activation.path is not None and search.findings.calls[activation.path] > 1:
        activation = Activation(activation.name, activation.function, activation.path)
    return FFN(
        layer=layer,
        hidden=entry.hidden,
        width=entry.width,
        up=entry.up,
        gate=entry.gate,
        activation=activation,
        down=entry.down,
        model=model,
        name=name,
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
