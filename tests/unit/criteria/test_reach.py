"""What a level asks of a calibrated criterion, and what ties and zeros leave of it."""

from __future__ import annotations

import pytest
import torch
from test_built_in_calibrated import Columns, Given, calibrated, sample
from torch import Tensor

from model_parts import find_ffns
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.criteria.reach import Reach, misses
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = {"quantile": "intermediate", "teal": "input", "cats": "gate", "countdown_m": "up"}


def tied(dtype: torch.dtype, share: float) -> Tensor:
    """Numbers of which a share are the largest but for the last hundredth, all the same in 16 bits."""
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(100, 100, generator=draw)
    flat = values.flatten()
    order = flat.argsort()
    top = order[int((0.99 - share) * len(flat)) : int(0.99 * len(flat))]
    flat[top] = 1.5 + 1e-4 * torch.rand(len(top), generator=draw)
    flat[order[int(0.99 * len(flat)) :]] = 2
    return values.to(dtype).float()


@pytest.mark.parametrize("rule", SITES)
@pytest.mark.parametrize(
    ("dtype", "level", "reached"),
    [
        # Twelve in a hundred tie below the last: at 90 % all of these stay.
        (torch.bfloat16, 0.9, 0.87),
        (torch.bfloat16, 0.95, 0.87),
        (torch.bfloat16, 0.85, 0.85),
        (torch.float32, 0.9, 0.9),
    ],
)
def test_ties_of_16_bits(rule: str, dtype: torch.dtype, level: float, reached: float) -> None:
    values = tied(dtype, 0.12)
    tensor = SITES[rule]
    criterion = create({"rule": rule})
    state = criterion.calibrate(Columns([], tensor), Given({tensor: values}))
    found = criterion.reach(state, level)
    assert found == Reach("sparsity", level, pytest.approx(reached, abs=3e-3))
    dropped = float(
        (~criterion.bind(Columns([], tensor), state).mask(values, level)).double().mean()
    )
    assert dropped == pytest.approx(found.reached, abs=2e-4)
    assert found.missed == (abs(level - reached) > 0.01)
    told = list(misses(criterion, {f"{tensor}.0": state}, [str(level)]))
    assert [place for _, place, _ in told] == ([f"{tensor}.0"] if found.missed else [])


@pytest.mark.parametrize("rule", ["chess", "mean_compensation", "shifted_relu", "r_sparse"])
@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
def test_what_is_reached_is_what_the_masks_drop(rule: str, level: float) -> None:
    ffn = find_ffns(tiny_model("llama-relu"))[0]
    given = sample(ffn)
    tensor = {"mean_compensation": "up", "r_sparse": "input"}.get(rule, "gate")
    given = Given({name: values.bfloat16().float() for name, values in given.items()})
    criterion = create({"rule": rule})
    with torch.no_grad():
        state = criterion.calibrate(Place(ffn, tensor), given)
    bound = calibrated(rule, Place(ffn, tensor), given)
    found = criterion.reach(state, level)
    zeros = ~bound.mask(given[tensor], level) | (given[tensor] == 0)
    assert found.reached == pytest.approx(float(zeros.double().mean()), abs=2e-3)
    assert found.target == pytest.approx(1 - (1 - level) * 0.9 if rule == "r_sparse" else level)


def test_zeros_are_there_at_any_level() -> None:
    values = torch.rand(50, 100, generator=torch.Generator().manual_seed(0))
    values[:, ::4] = values[:, 1::4] = values[:, 2::4] = 0
    criterion = create({"rule": "quantile"})
    state = criterion.calibrate(Columns([], "intermediate"), Given(intermediate=values))
    assert criterion.reach(state, 0.3).reached == pytest.approx(0.75, abs=1e-3)
    assert criterion.reach(state, 0.3).missed
    assert not criterion.reach(state, 0.9).missed
    assert criterion.reach(state, 0) is None
    assert criterion.reach(state, 1).reached == 1


@pytest.mark.parametrize("rule", ["cett", "tda"])
def test_a_cett_that_no_threshold_has_is_told(rule: str) -> None:
    ffn = find_ffns(tiny_model("llama"))[0]
    i = sample(ffn)["intermediate"]
    criterion = create({"rule": rule})
    with torch.no_grad():
        fine = criterion.calibrate(Place(ffn, "intermediate"), Given(intermediate=i))
        coarse = (i / i.abs().median()).round().clamp(-1, 1)
        tied = criterion.calibrate(Place(ffn, "intermediate"), Given(intermediate=coarse))
    assert criterion.reach(fine, 0.3) == ("cett", 0.3, 0.3)
    assert criterion.reach(tied, 0.3).missed
    assert criterion.reach(tied, 0.3).reached < 0.3


def test_an_allocation_asks_each_place_for_its_own() -> None:
    criterion = create({"rule": "teal", "allocation": "sensitivity"})
    values = torch.rand(50, 100, generator=torch.Generator().manual_seed(0))
    state = criterion.calibrate(Columns([], "input"), Given(input=values))
    state["share"] = torch.linspace(0, 1, 101) ** 2
    assert criterion.reach(state, 0.5) == (
        "sparsity",
        pytest.approx(0.25),
        pytest.approx(0.25, abs=1e-3),
    )


def test_what_is_worth_telling() -> None:
    assert not Reach("cett", 0.01, 0.01004).missed
    assert Reach("cett", 0.01, 0.0099).missed
