"""Products that leave out weights, against dense products of vectors that the definition masked."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_atlas import kernels
from sparsity_atlas.decoding import backend, cuda_products, maps
from sparsity_atlas.decoding.maps import GatedFFN, InputMap
from sparsity_atlas.decoding.vector import Vector
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.terms import TENSORS

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# Of a result's largest entry: float32 sums of some hundred products, and one rounding of the type.
# (Triton's interpreter cuts a bfloat16 off where the hardware rounds it.)
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
RULES: dict[str, Callable[[int], Threshold]] = {
    "fixed": lambda width: Threshold("fixed", constants=torch.tensor([0.6])),
    "by channel": lambda width: Threshold("fixed", constants=torch.linspace(0, 1.2, width)),
    "top-p": lambda width: Threshold("share", 0.7),
    "top-k": lambda width: Threshold("rank", width // 3),
    "max-p": lambda width: Threshold("peak", 0.3),
    "weighted": lambda width: Threshold("share", 0.7, weights=torch.linspace(0.5, 2, width)),
    "all": lambda width: Threshold("share", 1.0),
    "none": lambda width: Threshold("rank", 0),
}
DEVICES = ("cpu", "cuda")
TYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": tuple(CLOSE)}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels of a kind of device; those of CUDA run in Triton's interpreter, on the CPU's memory."""
    made = {"cpu": backend.Cpu(), "cuda": backend.Cuda()}[request.param]

    def chosen(x: Tensor, weight: Tensor) -> backend.Backend | None:
        allowed = x.dtype == weight.dtype and x.dtype in TYPES[request.param]
        return made if allowed and 1 <= len(x) <= backend.MOST_TOKENS else None

    monkeypatch.setattr(maps, "backend_of", chosen)
    return str(request.param)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def near(found: Tensor, wanted: Tensor, close: float) -> None:
    """Of one type and shape, and alike."""
    assert found.shape == wanted.shape
    scale = float(wanted.abs().max()) or 1.0
    assert float((found.double() - wanted.double()).abs().max()) <= close * scale


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_map_of_a_masked_vector(device: str, name: str, tokens: int) -> None:
    """Widths that no block divides; a bias."""
    inputs, outputs = 101, 77
    for dtype in TYPES[device]:
        x = drawn(tokens, inputs, dtype=dtype, seed=1)
        weight = drawn(outputs, inputs, dtype=dtype, seed=2)
        bias = drawn(outputs, dtype=dtype, seed=3)
        rule = RULES[name](inputs)
        found = InputMap(weight, bias)(x, rule)
        kept = kernels.reference(rule, x, x).out
        wanted = F.linear(kept.double(), weight.double(), bias.double())
        assert found.dtype == dtype
        near(found, wanted, CLOSE[dtype])


def test_roundings_do_not_add_up_along_a_long_sum() -> None:
    """Of equal terms, whose roundings go one way: one long sum is off by 1.4e-4."""
    x = torch.full((1, 14336), 0.1)
    found = backend.Cpu().by_inputs(Vector(x), torch.ones(14336, 20), None)
    near(found, x.double().sum(-1, keepdim=True).expand(1, 20), 4e-6)


@pytest.mark.parametrize("site", maps.SITES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_gated_ffn(device: str, site: str, tokens: int) -> None:
    """By fixed and by found thresholds, against the dense way of the same class."""
    hidden, width = 27, 22
    # ReLU in one type alone: it is one line in each place.
    cases = [*((dtype, "silu") for dtype in TYPES[device]), (torch.float32, "relu")]
    for (dtype, activation), rule in itertools.product(cases, ("by channel", "top-p")):
        x = drawn(tokens, hidden, dtype=dtype, seed=4)
        up, gate = (drawn(width, hidden, dtype=dtype, seed=seed) / 5 for seed in (5, 6))
        down = drawn(hidden, width, dtype=dtype, seed=7) / 5
        sizes = {"input": hidden}
        rules = {name: RULES[rule](sizes.get(name, width)) for name in TENSORS[site]}
        ffn = GatedFFN(up, gate, down, activation, site)
        # Beside a threshold an entry may be kept by one order of sums and dropped by another; float32 has
        # none.
        near(ffn(x, rules), ffn._dense(x, rules), 20 * CLOSE[dtype])


def hard(width: int, dtype: torch.dtype) -> Tensor:
    """Rows with ties, zeros of both signs, the smallest numbers there are, and one that is kept alone."""
    normal = drawn(4, width, dtype=torch.float32, seed=8)
    rows = [(2 * normal[0]).round() / 2, normal[1] * 2.0**-140, normal[2].clamp(min=0), normal[3]]
    rows[3][width // 2] = 500.0
    rows[2][::7] = -0.0
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("name", RULES)
def test_masks_are_those_of_the_definition_bit_for_bit(device: str, name: str) -> None:
    """Products with ones and zeros, and their sums, are exact: what comes out is the masked vector itself."""
    width = 66
    for dtype in TYPES[device]:
        rows = hard(width, dtype)
        rule = RULES[name](width)
        if name == "fixed":
            # A constant that entries tie with.
            rule = Threshold("fixed", constants=torch.tensor([0.5]))
        made = InputMap(torch.eye(width, dtype=dtype))
        wanted = kernels.reference(rule, rows, rows).out
        assert torch.equal(made(rows, rule), wanted)
        for row, kept in zip(rows, wanted, strict=True):
            assert torch.equal(made(row[None], rule), kept[None])


@pytest.mark.parametrize("site", maps.SITES)
@pytest.mark.parametrize("rule", ["fixed", "top-p"])
def test_masks_of_factors_are_those_of_the_definition(device: str, site: str, rule: str) -> None:
    """With ReLU and maps of ones and zeros everything is exact, but for the rounding of u ⊙ g."""
    width, dtype = 34, torch.bfloat16
    rows = hard(width, dtype)
    one = torch.eye(width, dtype=dtype)
    ffn = GatedFFN(one, one.flip(0), one, "relu", site)
    cut = Threshold("fixed", constants=torch.tensor([0.5]))
    found = cut if rule == "fixed" else RULES[rule](width)
    rules = dict.fromkeys(TENSORS[site], found)
    for some in (rows, rows[:1]):
        made, wanted = ffn(some, rules), ffn._dense(some, rules)
        assert torch.equal(made != 0, wanted != 0)
        near(made, wanted, CLOSE[dtype])


def test_rows_that_no_token_keeps_are_not_read(device: str) -> None:
    """They hold NaN, which a product with zero would show."""
    x = drawn(2, 64, dtype=torch.float32)
    x[:, 10:50] = 0.1
    weight = drawn(48, 64, dtype=torch.float32)
    rule = Threshold("fixed", constants=torch.tensor([0.2]))
    kept = kernels.reference(rule, x, x).out
    wanted = F.linear(kept, weight)
    weight[:, (kept == 0).all(0)] = torch.nan
    near(InputMap(weight)(x, rule), wanted, 1e-6)


@pytest.mark.parametrize("site", ["gate", "up"])
@pytest.mark.parametrize("rule", ["fixed", "top-p"])
def test_rows_of_the_other_factor_are_not_read(device: str, site: str, rule: str) -> None:
    hidden, width = 24, 22
    x = drawn(1, hidden, dtype=torch.float32, seed=1)
    up, gate = (drawn(width, hidden, dtype=torch.float32, seed=seed) for seed in (2, 3))
    down = drawn(hidden, width, dtype=torch.float32, seed=4)
    rules = {site: RULES[rule](width)}
    wanted = GatedFFN(up, gate, down, "silu", site)._dense(x, rules)
    first = F.silu(F.linear(x, gate)) if site == "gate" else F.linear(x, up)
    dropped = kernels.reference(rules[site], first, first).out[0] == 0
    assert 0 < int(dropped.sum()) < width
    (up if site == "gate" else gate)[dropped] = torch.nan
    down[:, dropped] = torch.nan
    near(GatedFFN(up, gate, down, "silu", site)(x, rules), wanted, 1e-5)


def test_the_same_bits_each_time_and_at_each_number_of_threads(device: str) -> None:
    x, weight = drawn(1, 700, dtype=torch.float32), drawn(600, 700, dtype=torch.float32, seed=1)
    rule = RULES["fixed"](700)
    made = InputMap(weight)
    first = made(x, rule)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(made(x, rule), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("units", [False, True])
def test_every_way_to_cut_a_product(listed: bool, tokens: int, split: int, units: bool) -> None:
    """Programs without a row, tiles that reach beyond both ends."""
    x = drawn(tokens, 90, dtype=torch.float32)
    weight = drawn(70, 90, dtype=torch.float32, seed=1)
    rule = RULES["fixed"](90)
    vector = maps.prepared(rule, x, fused=True)
    wanted = F.linear(vector.masked(), weight)
    cut = cuda_products.Cut(rows=32, columns=32, split=split, warps=4, listed=listed, units=units)
    for _ in range(2):  # counters are as they were
        near(cuda_products.by_inputs(vector, weight.t().contiguous(), cut=cut), wanted, 1e-6)


@pytest.mark.parametrize("name", ["fixed", "top-p", "top-k"])
def test_products_know_what_is_likely_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which chooses their cut: of a map, of an FFN's factors and of its last map."""
    seen: list[float] = []

    class Watched(backend.Cpu):
        def by_inputs(self, vector: Vector, transposed: Tensor, bias: Tensor | None) -> Tensor:
            seen.append(vector.expected)
            return super().by_inputs(vector, transposed, bias)

    monkeypatch.setattr(maps, "backend_of", lambda x, weight: Watched())
    rule = RULES[name](24)
    x, weight = drawn(1, 24, dtype=torch.float32), drawn(24, 24, dtype=torch.float32)
    InputMap(weight)(x, rule, 0.3)
    InputMap(weight)(x, rule)
    assert seen == [0.3, 0.5]
    for site in maps.SITES:
        seen.clear()
        shares = {one: place / 10 for place, one in enumerate(TENSORS[site], 6)}
        ffn = GatedFFN(weight, weight, weight, "silu", site)
        ffn(x, dict.fromkeys(TENSORS[site], rule), shares)
        factors = [shares["input"]] * 2 if "input" in shares else []
        last = [] if site == "input" else [shares[TENSORS[site][-1]]]
        assert seen == factors + last


def test_what_is_not_finite_is_not_lost(device: str) -> None:
    for number in (torch.nan, torch.inf):
        x = drawn(1, 50, dtype=torch.float32)
        x[0, 7] = number
        weight = drawn(30, 50, dtype=torch.float32, seed=1)
        for rule in ("fixed", "top-p"):
            found = InputMap(weight)(x, RULES[rule](50))
            wanted = F.linear(kernels.reference(RULES[rule](50), x, x).out, weight)
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(17, torch.float32), (1, torch.float64), (0, torch.float32)]
)
def test_what_no_kernel_is_made_for_goes_the_dense_way(tokens: int, dtype: torch.dtype) -> None:
    x, weight = drawn(tokens, 20, dtype=torch.float32).to(dtype), drawn(10, 20, dtype=dtype)
    assert backend.backend_of(x, weight) is None
    if tokens == 17:
        rule = RULES["top-p"](20)
        wanted = F.linear(kernels.reference(rule, x, x).out, weight)
        assert torch.equal(InputMap(weight)(x, rule), wanted)


def test_a_wrong_site_or_rule_is_refused() -> None:
    up, down = torch.ones(4, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match="site"):
        GatedFFN(up, up, down, "silu", "o_input")
    with pytest.raises(ValueError, match="activation"):
        GatedFFN(up, up, down, "tanh", "gate")
    with pytest.raises(ValueError, match="rules"):
        GatedFFN(up, up, down, "silu", "gate")(torch.ones(1, 3), {"up": Threshold("peak", 0.1)})
