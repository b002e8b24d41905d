"""The field's names for the places in a decoder's layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import combinations, groupby
from typing import Literal, NamedTuple, get_args

# FFN(x) = W_d (u ⊙ g), u = W_u x, g = σ(W_g x).
FFNSite = Literal["input", "up", "gate", "intermediate", "all_inputs"]
# What the query, key and value maps read; what the output map of the attention reads; all linear maps.
AttentionSite = Literal["qkv_input", "o_input", "all_linear_inputs"]
Site = Literal[FFNSite, AttentionSite]
FFN_SITES: tuple[str, ...] = get_args(FFNSite)
ATTENTION_SITES: tuple[str, ...] = get_args(AttentionSite)
SITES: tuple[str, ...] = get_args(Site)

# The tensors that a site concerns, in the order in which a forward pass makes them.
TENSORS = {
    "input": ("input",),
    "up": ("up",),
    "gate": ("gate",),
    "intermediate": ("intermediate",),
    "all_inputs": ("input", "intermediate"),
    "qkv_input": ("qkv_input",),
    "o_input": ("o_input",),
    "all_linear_inputs": ("qkv_input", "o_input", "input", "intermediate"),
}
# What several maps read, by the maps of which each can have a mask of its own.
PROJECTED = {
    "qkv_input": ("q_input", "k_input", "v_input"),
    "input": ("up_input", "gate_input"),
}
# What a spelling says where they have.
_PROJECTIONS = "@projections"
BY_PROJECTION = tuple(site for site, tensors in TENSORS.items() if {*tensors} & {*PROJECTED})
TENSORS |= {
    f"{site}{_PROJECTIONS}": tuple(
        one for tensor in TENSORS[site] for one in PROJECTED.get(tensor, (tensor,))
    )
    for site in BY_PROJECTION
}
# All that is captured, in that order.
STORED = ("qkv_input", "o_input", "input", "up", "gate", "intermediate")
# What a decoder's layer hands on to the next one: at no site, since nothing is dropped there.
RESIDUAL = "residual"
# Those of the attention; the others are of the parts beside it.
ATTENTION_TENSORS = ("qkv_input", "o_input")
_PROJECTED_OF = {one: tensor for tensor, of in PROJECTED.items() for one in of}
# All that can be masked, in that order.
MASKED = tuple(one for tensor in STORED for one in (*PROJECTED.get(tensor, ()), tensor))
# Inputs of linear maps; `up` and `gate` are outputs.
LINEAR_INPUTS = TENSORS["all_linear_inputs"]
# What a decoder's layer may hold.
ATTENTION = "attention"
FFN = "ffn"
SHARED = "shared"
EXPERTS = "experts"
PARTS = (ATTENTION, FFN, SHARED, EXPERTS)
# Those that must be named with a tensor: of a dense layer's parts the tensor's name tells which it is.
NAMED_PARTS = (SHARED, EXPERTS)
# What tells where the rows of routed experts go: the experts of each token, and how much each counts.
ROUTING = ("index", "weights")

# What a language model is: it predicts the next token, or masked ones among all others.
CAUSAL, DIFFUSION = "causal", "diffusion"
KINDS = (CAUSAL, DIFFUSION)

# What a forward pass is for; whoever calls the model says so.
Phase = Literal["scoring", "prompt", "generation", "denoising"]
PHASES: tuple[Phase, ...] = get_args(Phase)
SCORING, PROMPT, GENERATION, DENOISING = PHASES
# The row of a table that stands for all of them together.
EVERY_PHASE = "all"
# What tokens are counted as: in a phase as often as lm-eval runs them, and each token of a document once.
UNIQUE = "unique"
ACCOUNTS = (*PHASES, UNIQUE)


# The parts beside attention, to some of which an FFN's site may be confined.
PartBeside = Literal["ffn", "shared", "experts"]
BESIDE: tuple[str, ...] = get_args(PartBeside)


# What begins the layers that a spelling confines its site to.
_LAYERS = "layers"


def confined(
    site: str, parts: Collection[str], layers: Collection[int] = (), *, each: bool = False
) -> str:
    """A site in some parts of some layers only, as paths spell it: `intermediate@experts@layers0-3+7`.

    Args:
        site: one of `SITES`.
        parts: of `BESIDE`, in any order; none or all of them mean the site in every part.
        layers: numbers of layers, in any order; none: every layer.
        each: whether each map that reads a tensor has a mask of its own: `qkv_input@projections`.
    """
    named = [part for part in BESIDE if part in parts]
    spelled = site if len(named) in (0, len(BESIDE)) else f"{site}@{'+'.join(named)}"
    spelled += _PROJECTIONS if each else ""
    return f"{spelled}@{_LAYERS}{'+'.join(_ranges(layers))}" if layers else spelled


def _ranges(layers: Collection[int]) -> Iterator[str]:
    """Numbers in ascending order; those that follow each other as first and last."""
    # Of numbers that follow each other, each is as far from its place among them all.
    for _, run in groupby(enumerate(sorted(set(layers))), lambda place: place[1] - place[0]):
        numbers = [number for _, number in run]
        yield str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def plain(site: str) -> str:
    """The site of `SITES` that a spelling names, whatever parts and layers it is confined to."""
    return site.partition("@")[0]


def stored(tensor: str) -> str:
    """The tensor of `STORED` that one which can be masked holds."""
    return _PROJECTED_OF.get(tensor, tensor)


def in_every_layer(site: str) -> str:
    """What a spelling names without the layers that it is confined to."""
    return site.partition(f"@{_LAYERS}")[0]


def by_projection(site: str) -> bool:
    """Whether each map that reads a tensor of a site as paths spell it has a mask of its own."""
    return in_every_layer(site).endswith(_PROJECTIONS)


def with_one_mask(site: str) -> str:
    """What a spelling names where one mask serves all maps that read a tensor."""
    return confined(plain(site), parts_named(site), layers_named(site))


def everywhere(site: str) -> str:
    """What a spelling names in all parts of every layer: a key of `TENSORS`."""
    return confined(plain(site), (), each=by_projection(site))


def parts_named(site: str) -> tuple[str, ...]:
    """The parts that a spelling confines its site to; none: it is that of all parts."""
    names = in_every_layer(site).removesuffix(_PROJECTIONS).partition("@")[2]
    return tuple(names.split("+")) if names else ()


def layers_named(site: str) -> tuple[int, ...]:
    """The layers that a spelling confines its site to, ascending; none: it is that of every layer."""
    ranges = site.partition(f"@{_LAYERS}")[2]
    ends = [one.partition("-") for one in ranges.split("+")] if ranges else []
    return tuple(
        number for low, _, high in ends for number in range(int(low), int(high or low) + 1)
    )


def well_spelled(site: str) -> bool:
    """Whether a path may have this as its site, of which there is one spelling."""
    whole = in_every_layer(site)
    layers = site.removeprefix(whole)
    if whole not in SPELLED or (layers and re.fullmatch(SPELLED_LAYERS, layers) is None):
        return False
    named = parts_named(site), layers_named(site)
    return confined(plain(site), *named, each=by_projection(site)) == site


# As a regular expression, what may follow one of `SPELLED`: six digits are layers enough.
SPELLED_LAYERS = rf"@{_LAYERS}\d{{1,6}}(?:-\d{{1,6}})?(?:\+\d{{1,6}}(?:-\d{{1,6}})?)*"
# Everything that a path may have as its site, in every layer.
SPELLED: tuple[str, ...] = (
    *SITES,
    *(
        confined(site, parts)
        for site in FFN_SITES
        for count in range(1, len(BESIDE))
        for parts in combinations(BESIDE, count)
    ),
    *(
        confined(site, parts, each=True)
        for site in BY_PROJECTION
        for count in range(len(BESIDE) if site in FFN_SITES else 1)
        for parts in combinations(BESIDE, count)
    ),
)


def tensors_at(site: str) -> tuple[str, ...]:
    """The tensors that a site as paths spell it concerns, as `TENSORS` has them."""
    return TENSORS[everywhere(site)]


class PlaceKey(NamedTuple):
    """One tensor of one part of one layer."""

    layer: int
    part: str
    tensor: str


# What a task's score may be: a share of its documents, or nats a token: of a causal model's loss, or of the
# bound of it that a masked-diffusion model gives.
Kind = Literal["accuracy", "loss", "bound"]
SCORE_KINDS: tuple[str, ...] = get_args(Kind)
IN_NATS = ("loss", "bound")

# How a criterion's level is spread over layers.
ALLOCATIONS = ("uniform", "equal_cett", "sensitivity", "greedy", "evolutionary")
# Whose rows a calibration looks at together, where a layer has experts.
CALIBRATIONS = ("per_layer", "per_expert")
# The row of a table that stands for all tasks of a kind together.
AVERAGE = "average"
# Models below which nothing is said about an order of them.
LEAST_MODELS = 5
