"""What is read is what the model used; masks act as if they were written into the forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts import find_ffns, shown
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.find import TENSORS, Part, find_parts, observe, transform
from sparsity_atlas.sites.part import by_layer, sites_of
from sparsity_atlas.terms import FFN_SITES
from tiny_models import CUT, HIDDEN, LAYERS, WIDTH, Strange, tiny_model, token_ids, top_tail

pytestmark = pytest.mark.usefixtures("one_thread")

MaskOf = Callable[[int, str, Tensor], Tensor]
MODELS = ("llama", "phi3", "lfm2", "gpt2", "opt", "gpt_neox", "falcon", "cohere")
LAYOUTS = (
    *("gate_up", "up_gate", "gated", "gated-in-place", "gated-shared", "flattened", "maps"),
    *("clamped-shifted", "clamped-shared", "clamped-after", "cut"),
)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return getattr(output, "logits", output)


def by_value(layer: int, name: str, tensor: Tensor) -> Tensor:
    """Keep the larger half of each row, by magnitude: depends on every number that is shown."""
    assert name in ("input", "up", "gate", "intermediate")
    size = tensor.abs()
    return size >= size.median(dim=-1, keepdim=True).values


def at_random(layer: int, name: str, tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * layer + len(name))
    return torch.rand(tensor.shape, generator=generator) < 0.6


class ByHand:
    """FFNs written out for one site and mask, without any code under test."""

    def __init__(self, site: str, mask_of: MaskOf) -> None:
        self.tensors = TENSORS[site]
        self.mask_of = mask_of

    def masked(self, layer: int, name: str, tensor: Tensor, write: Tensor | None = None) -> Tensor:
        write = tensor if write is None else write
        if name not in self.tensors:
            return write
        return write * self.mask_of(layer, name, tensor)

    def gated(self, layer: int, x: Tensor, up: Callable, gate: Callable, down: Callable) -> Tensor:
        x = self.masked(layer, "input", x)
        u, g = up(x), gate(x)
        i = u * g
        i = self.masked(layer, "up", u, i)
        i = self.masked(layer, "gate", g, i)
        return down(self.masked(layer, "intermediate", i))

    def ungated(self, layer: int, x: Tensor, act: Callable, down: Callable) -> Tensor:
        i = act(self.masked(layer, "input", x))
        return down(self.masked(layer, "intermediate", i))

    def rewrite(self, model: nn.Module, name: str) -> None:
        """Put the written-out FFNs in the place of the model's."""
        getattr(self, name.replace("-", "_"))(model)

    def llama(self, model: nn.Module) -> None:
        for layer, block in enumerate(model.model.layers):
            mlp = block.mlp

            def forward(mlp: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                return self.gated(
                    layer,
                    x,
                    lambda x: F.linear(x, mlp.up_proj.weight),
                    lambda x: F.silu(F.linear(x, mlp.gate_proj.weight)),
                    lambda i: F.linear(i, mlp.down_proj.weight),
                )

            mlp.forward = MethodType(forward, mlp)

    cohere = llama

    def phi3(self, model: nn.Module) -> None:
        for layer, block in enumerate(model.model.layers):
            mlp = block.mlp

            def forward(mlp: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                weight = mlp.gate_up_proj.weight
                return self.gated(
                    layer,
                    x,
                    lambda x: F.linear(x, weight)[..., WIDTH:],
                    lambda x: F.silu(F.linear(x, weight)[..., :WIDTH]),
                    lambda i: F.linear(i, mlp.down_proj.weight),
                )

            mlp.forward = MethodType(forward, mlp)

    def lfm2(self, model: nn.Module) -> None:
        for layer, block in enumerate(model.model.layers):
            mlp = block.feed_forward

            def forward(mlp: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                return self.gated(
                    layer,
                    x,
                    lambda x: F.linear(x, mlp.w3.weight),
                    lambda x: F.silu(F.linear(x, mlp.w1.weight)),
                    lambda i: F.linear(i, mlp.w2.weight),
                )

            mlp.forward = MethodType(forward, mlp)

    def gpt2(self, model: nn.Module) -> None:
        for layer, block in enumerate(model.transformer.h):
            mlp = block.mlp

            def forward(mlp: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                return self.ungated(
                    layer,
                    x,
                    lambda x: F.gelu(x @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh"),
                    lambda i: i @ mlp.c_proj.weight + mlp.c_proj.bias,
                )

            mlp.forward = MethodType(forward, mlp)

    def opt(self, model: nn.Module) -> None:
        for layer, block in enumerate(model.model.decoder.layers):
            # The decoder layer itself calls both, on tokens in one row: put the rows back.
            for name, linear in (("input", block.fc1), ("intermediate", block.fc2)):

                def forward(
                    linear: nn.Linear, rows: Tensor, layer: int = layer, name: str = name
                ) -> Tensor:
                    tokens = rows.unflatten(0, token_ids().shape)
                    rows = self.masked(layer, name, tokens).flatten(0, 1)
                    return F.linear(rows, linear.weight, linear.bias)

                linear.forward = MethodType(forward, linear)

    def _two_linears(self, blocks: list[nn.Module]) -> None:
        for layer, mlp in enumerate(blocks):

            def forward(mlp: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                first, second = mlp.dense_h_to_4h, mlp.dense_4h_to_h
                return self.ungated(
                    layer,
                    x,
                    lambda x: F.gelu(F.linear(x, first.weight, first.bias)),
                    lambda i: F.linear(i, second.weight, second.bias),
                )

            mlp.forward = MethodType(forward, mlp)

    def gpt_neox(self, model: nn.Module) -> None:
        self._two_linears([block.mlp for block in model.gpt_neox.layers])

    def falcon(self, model: nn.Module) -> None:
        self._two_linears([block.mlp for block in model.transformer.h])

    def strange(self, model: nn.Module, layout: str) -> None:
        functions = {
            "gate_up": F.silu,
            "up_gate": lambda x: F.gelu(x, approximate="tanh"),
            "gated": torch.sigmoid,
            "maps": F.gelu,
            "clamped-shifted": lambda z: z.clamp(max=7) * torch.sigmoid(1.702 * z.clamp(max=7)),
            "clamped-shared": lambda z: F.silu(z.clamp(max=10)),
            "clamped-after": lambda z: F.silu(z).clamp(max=7),
            "cut": lambda z: F.silu(top_tail(z, CUT)),
        }
        function = functions.get(layout, F.silu)
        for layer, block in enumerate(model.yy):
            ffn = block["k3"]

            def forward(ffn: nn.Module, x: Tensor, layer: int = layer) -> Tensor:
                def up(x: Tensor) -> Tensor:
                    match layout:
                        case "maps":
                            return x @ ffn.w8.kernel
                        case "gate_up":
                            return F.linear(x, ffn.qov.weight, ffn.qov.bias)[..., WIDTH:]
                        case "up_gate":
                            return F.linear(x, ffn.qov.weight, ffn.qov.bias)[..., :WIDTH]
                    made = F.linear(x, ffn.qov.weight, ffn.qov.bias)
                    match layout:
                        case "clamped-shifted":
                            return made.clamp(-7, 7) + 1
                        case "clamped-shared":
                            return made.clamp(-10, 10)
                        case "clamped-after":
                            return made.clamp(-7, 7)
                    return made

                def gate(x: Tensor) -> Tensor:
                    match layout:
                        case "maps":
                            return x @ ffn.w3.kernel
                        case "gate_up":
                            return F.linear(x, ffn.qov.weight, ffn.qov.bias)[..., :WIDTH]
                        case "up_gate":
                            return F.linear(x, ffn.qov.weight, ffn.qov.bias)[..., WIDTH:]
                    return F.linear(x, ffn.mub.weight, ffn.mub.bias)

                def down(i: Tensor) -> Tensor:
                    if layout == "maps":
                        return i @ ffn.w5.kernel
                    return F.linear(i, ffn.arx.weight, ffn.arx.bias)

                return self.gated(layer, x, up, lambda x: function(gate(x)), down)

            ffn.forward = MethodType(forward, ffn)


def named_sites(name: str) -> tuple[str, ...]:
    ungated = name in ("gpt2", "opt", "gpt_neox", "falcon")
    return ("input", "intermediate", "all_inputs") if ungated else FFN_SITES


CASES = [(name, site) for name in (*MODELS, *LAYOUTS) for site in named_sites(name)]


@pytest.fixture(scope="module")
def found() -> Callable[[str], list[Part]]:
    """Parts of a model or layout, found once."""
    known: dict[str, list[Part]] = {}

    def find(name: str) -> list[Part]:
        if name not in known:
            model = Strange(name) if name in LAYOUTS else tiny_model(name, initializer_range=0.3)
            known[name] = find_parts(model)
        return known[name]

    return find


@pytest.mark.parametrize("mask_of", [by_value, at_random])
@pytest.mark.parametrize(("name", "site"), CASES)
def test_masks_equal_a_forward_pass_by_hand(
    name: str, site: str, mask_of: MaskOf, found: Callable[[str], list[Part]]
) -> None:
    ffns = found(name)
    ids = token_ids()
    untouched = logits_of(ffns[0].model, ids)
    with transform(ffns, site, shown(mask_of)):
        masked = logits_of(ffns[0].model, ids)

    by_hand = ByHand(site, mask_of)
    if name in LAYOUTS:
        model: nn.Module = Strange(name)
        by_hand.strange(model, name)
    else:
        model = tiny_model(name, initializer_range=0.3)
        by_hand.rewrite(model, name)
    expected = logits_of(model, ids)
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
    assert (masked - untouched).abs().max() > 1e-3
    assert torch.equal(logits_of(ffns[0].model, ids), untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype)
    ffns = find_parts(model)
    ids = token_ids()
    untouched = logits_of(model, ids)
    for site in sites_of(ffns):
        for mask_of in (lambda *_: None, lambda _layer, _name, t: torch.ones_like(t).bool()):
            with transform(ffns, site, shown(mask_of)):
                assert torch.equal(logits_of(model, ids), untouched)


@pytest.mark.parametrize("name", ["llama", "opt", "gated-in-place", "gated-shared"])
def test_all_tensors_come_by_in_order(name: str, found: Callable[[str], list[Part]]) -> None:
    ffns = found(name)
    order: list[tuple[int, str]] = []
    with observe(
        ffns, sites_of(ffns), shown(lambda layer, tensor, _: order.append((layer, tensor)))
    ):
        logits_of(ffns[0].model, token_ids())
    per_layer = [[tensor for layer, tensor in order if layer == own] for own in by_layer(ffns)]
    assert [layer for layer, _ in order] == sorted(layer for layer, _ in order)
    for tensors in per_layer:
        assert tensors[0] == ("qkv_input" if "qkv_input" in sites_of(ffns) else "input")
        assert tensors[-1] == "intermediate"
        assert sorted(tensors) == sorted(
            {name for site in sites_of(ffns) for name in TENSORS[site]}
        )


def test_one_site_may_be_named_without_a_list() -> None:
    ffns = find_ffns(tiny_model("llama"))
    seen: list[str] = []
    with observe(ffns, "up", shown(lambda _, name, __: seen.append(name))):
        logits_of(ffns[0].model, token_ids())
    assert seen == ["up"] * LAYERS


def test_entries_masked_out_become_zero_whatever_they_are() -> None:
    model = tiny_model("llama")
    ffns = find_ffns(model)
    broken = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        broken.weight[3] = torch.nan
        broken.weight[5] = torch.inf
    reached: list[Tensor] = []
    handle = ffns[0].down.module.register_forward_hook(lambda _, args, __: reached.append(args[0]))

    def mask_of(layer: int, name: str, tensor: Tensor) -> Tensor:
        mask = torch.ones_like(tensor).bool()
        mask[..., [3, 5, 7]] = False
        return mask

    # Registered after ours, so the hook sees what the down projection gets.
    for site in ("up", "gate", "intermediate"):
        with transform(ffns, site, shown(mask_of)):
            assert logits_of(model, token_ids()).isfinite().all()
        assert (reached[-1][..., [3, 5, 7]] == 0).all()
    handle.remove()


def test_input_masks_leave_other_readers_of_the_same_tensor_alone() -> None:
    # In a parallel block attention reads the very tensor that the FFN reads.
    model = tiny_model("cohere")
    ffns = find_ffns(model)
    seen: dict[str, list[Tensor]] = {"attention": [], "ffn": []}
    block = model.model.layers[0]
    handles = [
        block.self_attn.q_proj.register_forward_hook(lambda *a: seen["attention"].append(a[1][0])),
        block.mlp.up_proj.register_forward_hook(lambda *a: seen["ffn"].append(a[1][0])),
    ]
    with transform(ffns, "input", shown(lambda _, __, t: torch.zeros_like(t).bool())):
        logits_of(model, token_ids())
    for handle in handles:
        handle.remove()
    assert seen["attention"][0].abs().min() > 0
    assert (seen["ffn"][0] == 0).all()


def test_the_mask_of_the_input_is_asked_for_once() -> None:
    ffns = find_ffns(tiny_model("llama"))
    asked: Counter[tuple[int, str]] = Counter()

    def mask_of(layer: int, name: str, tensor: Tensor) -> Tensor:
        asked[layer, name] += 1
        return at_random(layer, name, tensor)

    with transform(ffns, "all_inputs", shown(mask_of)):
        logits_of(ffns[0].model, token_ids())
    names = ("input", "intermediate")
    assert asked == {(layer, name): 1 for layer in range(LAYERS) for name in names}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_generation_with_a_cache_shows_each_new_token(name: str) -> None:
    model = tiny_model(name)
    ffns = find_ffns(model)
    shapes: list[tuple[int, ...]] = []
    sites = ("all_inputs",)
    with observe(ffns, sites, shown(lambda layer, name, t: shapes.append(tuple(t.shape)))):
        model.generate(
            token_ids(2, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    per_pass = 2 * LAYERS
    assert [shape[:2] for shape in shapes] == [(2, 5)] * per_pass + [(2, 1)] * (2 * per_pass)
    assert {shape[2] for shape in shapes} == {HIDDEN, WIDTH}


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("site", ["input", "up", "gate", "intermediate"])
def test_an_ffn_that_does_not_run_exactly_once_is_an_error(site: str, calls: int) -> None:
    model = Strange("gated")
    ffns = find_ffns(model)
    model.calls = calls
    # Of `up` and `gate`, the last tensor that a mask is written to may be named instead.
    pattern = (
        rf"layer 0: (intermediate|{site}) \(at yy\.0.*\) passed {calls} times .* expected once"
    )
    with observe(ffns, [site], shown(lambda *_: None)), pytest.raises(AtlasError, match=pattern):
        logits_of(model, token_ids())
    with (
        transform(ffns, site, shown(lambda *_: None)),
        pytest.raises(AtlasError, match=pattern),
    ):
        logits_of(model, token_ids())
    model.calls = 1
    logits_of(model, token_ids())


def test_a_failed_forward_pass_does_not_spoil_the_next() -> None:
    model = Strange("gated")
    ffns = find_ffns(model)
    seen: list[tuple[int, str]] = []
    fails = [True]

    def callback(layer: int, name: str, tensor: Tensor) -> None:
        if layer == 1 and fails.pop():
            raise MemoryError
        seen.append((layer, name))

    with observe(ffns, ["intermediate"], shown(callback)):
        with pytest.raises(MemoryError):
            logits_of(model, token_ids())
        fails.append(False)
        seen.clear()
        logits_of(model, token_ids())
    assert seen == [(0, "intermediate"), (1, "intermediate")]


def test_calling_a_part_of_the_model_is_an_error() -> None:
    model = tiny_model("llama")
    ffns = find_ffns(model)
    with (
        observe(ffns, ["input"], shown(lambda *_: None)),
        pytest.raises(AtlasError, match="outside a forward pass"),
        torch.no_grad(),
    ):
        model.model(token_ids())


def test_the_ffn_can_be_computed_inside_a_callback() -> None:
    ffns = find_ffns(tiny_model("phi3"))
    outputs: list[Tensor] = []

    def callback(layer: int, name: str, x: Tensor) -> None:
        outputs.append(ffns[layer].down(ffns[layer].intermediate(x)))

    with observe(ffns, ["input"], shown(callback)):
        logits_of(ffns[0].model, token_ids())
    assert len(outputs) == LAYERS


def test_hooks_go_with_the_context_even_after_an_error() -> None:
    model = tiny_model("llama")
    ffns = find_ffns(model)

    def fail() -> None:
        with (
            transform(ffns, "all_inputs", shown(lambda *_: None)),
            observe(ffns, FFN_SITES, shown(lambda *_: None)),
        ):
            assert any(module._forward_pre_hooks for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (lambda t: torch.ones_like(t), r"torch\.float32"),
        (lambda t: torch.ones_like(t[..., :1]).bool(), r"\[2, 6, 1\]"),
    ],
)
def test_a_mask_of_another_type_or_shape_is_an_error(
    mask: Callable[[Tensor], Tensor], found: str
) -> None:
    ffns = find_ffns(tiny_model("llama"))
    with (
        transform(ffns, "up", shown(lambda _, __, t: mask(t))),
        pytest.raises(AtlasError, match=f"layer 0: up: found a mask of .*{found}"),
    ):
        logits_of(ffns[0].model, token_ids())


def test_sites_that_are_not_there_are_errors() -> None:
    ffns = find_ffns(tiny_model("gpt2"))
    for site in ("up", "gate"):
        with (
            pytest.raises(
                AtlasError, match=f"site '{site}': layer 0 has none; its sites are input"
            ),
            transform(ffns, site, shown(lambda *_: None)),
        ):
            pass
    with (
        pytest.raises(AtlasError, match="unknown site 'attention'; known: input, up"),
        observe(ffns, ["attention"], shown(lambda *_: None)),
    ):
        pass
