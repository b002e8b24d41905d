"""Layers of a model whose small steps are joined while single tokens go through them.

A layer of Llama's kind (norm, attention, sum, norm, FFN, sum) starts some thirty launches beside its
products; here they are three, and maps that read the same are one product each. Which layers are of this
kind is not taken from names alone: each is tried beforehand, with a ring and a mask of random numbers, and
left as it is where it gives anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity_atlas.decoding.vector import Norm
from sparsity_atlas.lm.continuous.called import CACHE, arguments
from sparsity_atlas.lm.continuous.ring import Ring
from sparsity_atlas.models.logits.head import EXACT, REFUSALS, ROUNDED
from sparsity_atlas.sites.probe.hypotheses import relative_error
from sparsity_atlas.speed.attached import Unchanged
from sparsity_atlas.speed.joined_maps import ffn, is_own, reading
from sparsity_atlas.speed.replaced import Reader, Readers, SparseFFN, dense_meanwhile, put

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_READERS = ("q_proj", "k_proj", "v_proj")
_ATTENTION = {*_READERS, "o_proj"}
# Beside these, where each head of queries and keys has a norm (Qwen 3).
_HEAD_NORMS = {"q_norm", "k_norm"}
# Rows and places of the ring that a layer is tried with.
TRIED = 2, 80


Known = Unchanged["_Joined | None"]


@contextmanager
def joined(model: PreTrainedModel, known: Known | None = None) -> Iterator[int]:
    """Within: passes over one token of each row, with a `Ring`, go through joined layers.

    Args:
        model: the model.
        known: layers that were tried before.

    Yields:
        How many there are.
    """
    known = Unchanged() if known is None else known
    decoder: Any = model.get_decoder()
    name = next((one for one in CACHE if one in arguments(model)), None)
    turning = getattr(decoder, "rotary_emb", None)
    found: dict[int, _Joined] = {}
    if name is not None and turning is not None:
        waiting: list[Tensor] = []
        for place, layer in enumerate(getattr(decoder, "layers", ())):
            one = known.of(place, layer, partial(_right, layer, place, name, turning))
            if one is not None:
                one.waiting, found[place] = waiting, one
    with ExitStack() as stack:
        for place, one in found.items():
            one.first, one.last = place == min(found), place + 1 not in found
            put(stack, one.layer, one.forward)
        if found:
            _join_norm(stack, getattr(decoder, "norm", None))
        yield len(found)


def _is_norm(module: Any) -> bool:
    """Whether a module looks like a root-mean-square norm, and nothing hangs on it."""
    named = hasattr(module, "weight") and hasattr(module, "variance_epsilon")
    return named and is_own(module)


def _join_norm(stack: ExitStack, norm: Any) -> None:
    """Have the norm behind all layers be one launch for single tokens, if that is what it computes."""
    from sparsity_atlas.speed.cuda_step import normed

    if not _is_norm(norm):
        return
    own, weight = norm.forward, norm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED[0], len(weight), generator=generator).to(weight)

    def made(x: Tensor) -> Tensor:
        return normed(x, None, weight, norm.variance_epsilon)[1]

    def forward(x: Tensor) -> Tensor:
        found: Tensor = made(x[:, 0])[:, None] if x.shape[1] == 1 else own(x)
        return found

    with torch.no_grad():
        error = relative_error(own(x), made(x))
    # Written so that NaN is wrong.
    if error <= _allowed(x):
        put(stack, norm, forward)


def _right(layer: Any, place: int, name: str, turning: Any) -> _Joined | None:
    """A layer in its joined form; None where that gives something else."""
    if not _is_known(layer):
        return None
    one = _Joined(layer, place, name)
    # An entry at its threshold, that a rounding moves across, says nothing about the layer.
    with dense_meanwhile(layer):
        return one if _tried(one, turning) else None


def _allowed(x: Tensor) -> float:
    return EXACT if x.dtype == torch.float32 else ROUNDED


def _tried(one: _Joined, turning: Any) -> bool:
    """Whether a joined layer is right; one that trips over its arguments is not."""
    try:
        return one.is_right(turning)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        return False


def _is_known(layer: Any) -> bool:
    """Whether a layer looks like one that can be joined, and nothing hangs on what is passed over."""
    if {name for name, _ in layer.named_children()} != _LAYER:
        return False
    attention: Any = layer.self_attn
    within = {name for name, _ in attention.named_children()}
    if within not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, one) for one in _HEAD_NORMS & within]
    return (
        all(_is_norm(one) for one in norms)
        and all(hasattr(attention, one) for one in ("head_dim", "scaling"))
        and isinstance(attention.k_proj, nn.Linear)
        and is_own(attention)
        and "forward" not in layer.__dict__
    )


class _Joined:
    """The joined form of a layer.

    Attributes:
        layer: the layer.
        first: whether none of the layers before it is joined.
        last: whether the next layer adds nothing for this one.
        waiting: what was not yet added to what the last layer gave.
    """

    def __init__(self, layer: Any, place: int, name: str) -> None:
        """Join what can be joined.

        Args:
            layer: the layer.
            place: of it in the model, and in the ring.
            name: how it calls its cache.
        """
        self.layer, self.first, self.last = layer, True, True
        self.waiting: list[Tensor] = []
        self._own, self._place, self._name = layer.forward, place, name
        self._read = reading([getattr(layer.self_attn, one) for one in _READERS])
        self._ffn = ffn(layer.mlp)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """In place of the layer's own."""
        ring: Any = options.get(self._name)
        mask: Any = options.get("attention_mask")
        turns: Any = options.get("position_embeddings")
        if not _is_step(x, ring, mask, turns, self.layer.self_attn.head_dim):
            return self._own(x, *arguments, **options)
        more = self.waiting.pop() if self.waiting else None
        if self.first:
            # A launch that begins when all before it have ended: attention does not wait for mask and angles.
            x = x.clone()
        x, read = self._read_norm(x[:, 0], more)
        made = self._attention(read, ring, mask, turns)
        x, made = self._ffn_of_norm(x, made)
        if self.last:
            return x[:, None] + made
        self.waiting.append(x)
        return made

    def _normed(self, norm: Any, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        from sparsity_atlas.speed.cuda_step import normed

        return normed(x, more, norm.weight, norm.variance_epsilon)

    def _read_norm(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """x + more, [rows, hidden], and queries, keys and values of its norm."""
        norm = self.layer.input_layernorm
        readers = _readers(self.layer.self_attn)
        if readers is not None:
            found = readers.after_norm(x, Norm(more, norm.weight, norm.variance_epsilon))
            if found is not None:
                return found
        x, seen = self._normed(norm, x, more)
        return x, [one[:, 0] for one in self._read(seen[:, None])]

    def _ffn_of_norm(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """x + more, [rows, hidden], and what the FFN makes of its norm, [rows, 1, hidden]."""
        norm = self.layer.post_attention_layernorm
        forward = self.layer.mlp.__dict__.get("forward")
        if isinstance(forward, SparseFFN):
            found = forward.after_norm(x, Norm(more, norm.weight, norm.variance_epsilon))
            if found is not None:
                return found[0], found[1][:, None]
        x, seen = self._normed(norm, x, more)
        return x, self._ffn(seen[:, None])

    def _attention(self, read: Sequence[Tensor], ring: Any, mask: Tensor, turns: Any) -> Tensor:
        """What attention adds [rows, hidden], of queries, keys and values, [rows, ...] each."""
        from sparsity_atlas.speed.cuda_step import attended

        attention = self.layer.self_attn
        query, key, value = read
        if hasattr(attention, "q_norm"):
            query = self._by_head(attention.q_norm, query)
            key = self._by_head(attention.k_norm, key)
        like = key.unflatten(-1, (-1, 1, attention.head_dim))
        buffers = ring.buffers(self._place, like)
        found = attended(query, key, value, turns, mask, buffers, ring.clock, attention.scaling)
        made: Tensor = attention.o_proj(found[:, None])[:, 0]
        return made

    def _by_head(self, norm: Any, x: Tensor) -> Tensor:
        """A norm of each head of x [rows, heads * width]."""
        heads = x.reshape(-1, self.layer.self_attn.head_dim)
        return self._normed(norm, heads, None)[1].view_as(x)

    def is_right(self, turning: Any) -> bool:
        """Whether norms, attention and the whole give what the layer's own do, and keep the same."""
        attention = self.layer.self_attn
        norms = self.layer.input_layernorm, self.layer.post_attention_layernorm
        rows, size = TRIED
        weight = norms[0].weight
        generator = torch.Generator().manual_seed(self._place)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(weight)

        x = drawn(rows, 1, len(weight))
        clock = size // 3
        hidden = torch.rand(rows, 1, 1, size, generator=generator).to(x.device) < 0.3
        hidden[..., clock] = False
        mask = x.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(x.dtype).min)
        positions = torch.tensor([[size - 1], [5]], device=x.device)
        groups = attention.k_proj.out_features // attention.head_dim
        kept = [drawn(rows, groups, size, attention.head_dim) for _ in range(2)]

        def ring() -> tuple[Ring, list[Tensor]]:
            made = Ring(rows, size, x.device)
            made.clock.fill_(clock)
            buffers = made.buffers(self._place, kept[0])
            for one, value in zip(buffers, kept, strict=True):
                one.copy_(value)
            return made, [one[:, :, clock] for one in buffers]

        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            turns = turning(x, positions)
            options = {"attention_mask": mask, "position_embeddings": turns}
            for norm in norms:
                pairs.append((norm(x)[:, 0], self._normed(norm, x[:, 0], None)[1]))
            (own, own_kept), (ours, ours_kept) = ring(), ring()
            found = attention(hidden_states=x, **options, **{self._name: own})[0][:, 0]
            read = [one[:, 0] for one in self._read(x)]
            pairs.append((found, self._attention(read, ours, mask, turns)))
            pairs += zip(own_kept, ours_kept, strict=True)
            options |= {"position_ids": positions, "use_cache": True}
            wanted, made = (
                forward(x, **options, **{self._name: ring()[0]})
                for forward in (self._own, self.forward)
            )
            pairs.append((wanted - x, made - x))
        # Written so that NaN is wrong.
        return all(relative_error(*pair) <= _allowed(x) for pair in pairs)


def _is_step(x: Tensor, ring: Any, mask: Any, turns: Any, width: int) -> bool:
    """Whether a pass over x [rows, tokens, hidden] is over one token of each row."""
    return (
        x.shape[1] == 1
        and isinstance(ring, Ring)
        and ring.steps
        and isinstance(mask, torch.Tensor)
        and mask.shape == (len(x), 1, 1, ring.size)
        and mask.is_floating_point()
        and turns is not None
        and all(one.shape == (len(x), 1, width) for one in turns)
    )


def _readers(attention: Any) -> Readers | None:
    """What queries, keys and values are made by together, if something sparse is in their place."""
    modules = [getattr(attention, one) for one in _READERS]
    forward = modules[0].__dict__.get("forward")
    if not isinstance(forward, Reader):
        return None
    found = forward.readers
    same = len(found.modules) == len(modules) and all(map(operator.is_, found.modules, modules))
    return found if same else None
