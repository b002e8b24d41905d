"""What training makes of sparsity: points, laws, limits, and what is not told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.statistics.training_laws import BILLION, LAWS, LOGSPACE, POWER, fit
from sparsity_atlas.tables.read import Tables
from sparsity_atlas.tables.training import UNKNOWN, Fitted, Point, fit_points, law_of

TOKENS = np.array([1, 2, 5, 12, 40]) * 1e9


def rising(d: np.ndarray) -> np.ndarray:
    return 0.5 - 0.2 * d**-0.8


def points_of(ratios: np.ndarray, replicates: np.ndarray) -> list[Point]:
    return [
        Point(tokens, ratio, drawn)
        for tokens, ratio, drawn in zip(TOKENS[: len(ratios)], ratios, replicates.T, strict=True)
    ]


def test_each_replicate_of_documents_has_its_own_fit() -> None:
    """By a loop; points that lie on the law have no residuals to draw."""
    rng = np.random.default_rng(0)
    ratios = rising(TOKENS / BILLION)
    replicates = ratios + rng.normal(0, 0.003, (40, 1)) + rng.normal(0, 0.001, (40, 5))
    found = fit_points(LAWS[POWER], points_of(ratios, replicates))
    assert isinstance(found, Fitted)
    limits = [fit(LAWS[POWER], TOKENS, row).limit[0] for row in replicates]
    assert found.fits.limit[1:41] == pytest.approx(limits)
    assert found.residual == pytest.approx(0, abs=1e-7)
    low, high = found.ends(found.fits.limit)
    assert None not in (low, high)
    assert low <= np.quantile(limits, 0.025) < 0.5 < np.quantile(limits, 0.975) <= high


def test_few_points_have_the_tails_of_student() -> None:
    """Of a straight line in D's power the interval would be Student's t, here with one degree of freedom."""
    ratios = rising(TOKENS[:4] / BILLION) + np.array([1, -2, 1.5, -0.5]) * 1e-3
    found = fit_points(LAWS[POWER], points_of(ratios, np.repeat(ratios[None], 20, 0)))
    assert isinstance(found, Fitted)
    drawn = found.fits.at(TOKENS[:4])[21:] - found.fits.at(TOKENS[:4])[0]
    # |t| of one degree of freedom exceeds 1 half of the time; what is fitted errs less than a point.
    share = (np.abs(drawn[:, 1]) > found.residual).mean()
    assert 0.25 < share < 0.55
    assert np.abs(drawn[:, 1]).max() > 10 * found.residual


def test_points_that_are_too_few_are_refused_in_a_line() -> None:
    ratios = rising(TOKENS[:3] / BILLION)
    same = np.repeat(ratios[None], 20, 0)
    assert fit_points(LAWS[LOGSPACE], points_of(ratios, same)) == (
        "3 points, and the law has 4 parameters"
    )
    through = fit_points(LAWS[POWER], points_of(ratios, same))
    assert isinstance(through, Fitted)
    assert through.residual is None
    # One that does not cross the bar is none; nor are two of one number of tokens two.
    left_out = [*points_of(ratios, same)[:2], Point(9e9, None, same[:, 0])]
    twice = [*points_of(ratios, same)[:2], points_of(ratios, same)[1]]
    for some in (left_out, twice):
        assert fit_points(LAWS[POWER], some) == "2 points, and the law has 3 parameters"


def test_without_replicates_there_is_no_interval_of_documents() -> None:
    ratios = rising(TOKENS / BILLION)
    found = fit_points(LAWS[POWER], points_of(ratios, np.empty((0, 5))))
    assert isinstance(found, Fitted)
    assert found.documents == 0
    through = fit_points(LAWS[POWER], points_of(ratios[:3], np.empty((0, 3))))
    assert isinstance(through, Fitted)
    assert through.ends(through.fits.limit) == (None, None)


def test_a_fit_at_an_end_of_its_law_has_no_interval() -> None:
    falling = 1 - rising(TOKENS / BILLION)
    found = fit_points(LAWS[POWER], points_of(falling, np.repeat(falling[None], 20, 0)))
    assert isinstance(found, Fitted)
    assert found.fits.edge() == "the ratio does not rise with training"
    assert found.ends(found.fits.limit) == (None, None)


@pytest.mark.parametrize(
    ("activation", "law"),
    [
        ("silu", POWER),
        ("gelu", POWER),
        ("relu", LOGSPACE),
        ("relu2", LOGSPACE),
        ("drelu", LOGSPACE),
        ("fatrelu", LOGSPACE),
        ("gelu_pytorch_tanh", POWER),
        ("quick_gelu", POWER),
        # A name that holds another one: these are not zero for all that is negative, or end at 6.
        *((name, UNKNOWN) for name in ("leaky_relu", "prelu", "relu6", "xielu", "crelu", "RELU")),
        ("the class's own", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_the_law_of_an_activation(activation: str, law: str) -> None:
    assert law_of(activation) == law


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tables]:
    """Five checkpoints of one training, two of a larger one, and a model by itself."""
    results = tmp_path_factory.mktemp("trained")
    models = {f"a-{n}": {"tolerance": 0.42 + 0.2 / (n + 1)} for n in range(5)}
    models |= {f"b-{n}": {"parameters": 4_000_000} for n in range(2)}
    make_results(results, {**models, "c": {"parameters": 2_000_000}}, sites=["intermediate"])
    about = {
        f"{series}-{n}": Checkpoint(series, str(n), 1e9 * 3**n)
        for series, count in (("a", 5), ("b", 2))
        for n in range(count)
    }
    return results, make_tables(results, checkpoints=about)


def test_points_are_the_crossings(trained: tuple[Path, Tables]) -> None:
    _, tables = trained
    points = tables.training[tables.training["law"] == ""]
    assert set(points["model"]) == {f"a-{n}" for n in range(5)} | {"b-0", "b-1"}
    own = points[(points["series"] == "a") & (points["bar_label"] == "PPL-1%")]
    assert list(own["checkpoint"]) == ["0", "1", "2", "3", "4"]
    assert list(own["training_tokens"]) == [1e9, 3e9, 9e9, 27e9, 81e9]
    critical = tables.critical_sparsity.set_index(["model", "bar_label", "task"])
    for row in own.itertuples():
        found = critical.loc[row.model, "PPL-1%", "prose"]
        assert row.ratio == pytest.approx(1 - found["value"])
        assert row.ratio_low == pytest.approx(1 - found["interval_high"])
        assert row.ratio_high == pytest.approx(1 - found["interval_low"])
        assert row.crossing_level == found["crossing_level"]
    # More training, less tolerance here: more stays active.
    assert own["ratio"].is_monotonic_increasing


def test_laws_are_fitted_where_there_are_points_for_them(trained: tuple[Path, Tables]) -> None:
    _, tables = trained
    fits = tables.training_fits.set_index(["series", "law", "bar_label"])
    row = fits.loc["a", POWER, "PPL-1%"]
    points = tables.training[(tables.training["law"] == "") & (tables.training["series"] == "a")]
    own = points[points["bar_label"] == "PPL-1%"]
    plain = fit(LAWS[POWER], own["training_tokens"].to_numpy(), own["ratio"].to_numpy())
    assert row["limit"] == pytest.approx(plain.limit[0])
    assert row["alpha"] == pytest.approx(plain.alpha[0])
    assert row["limit_low"] <= row["limit"] <= row["limit_high"]
    assert row["of_activation"]
    assert row["activation_law"] == POWER
    assert (row["points"], row["left_out"]) == (5, 0)
    assert row["width_by_depth"] == pytest.approx(64 / 3)
    other = fits.loc["a", LOGSPACE, "PPL-1%"]
    assert not other["of_activation"]
    assert other["reason"] == "the ratio does not fall with training"
    few = fits.loc["b", POWER, "PPL-1%"]
    assert few["reason"] == "2 points, and the law has 3 parameters"
    assert not few["resolved"]
    lines = tables.training[tables.training["law"] != ""]
    assert set(lines["series"]) == {"a"}
    line = lines[(lines["law"] == POWER) & (lines["bar_label"] == "PPL-1%")]
    assert line["ratio"].to_numpy() == pytest.approx(
        plain.at(line["training_tokens"].to_numpy())[0]
    )
    assert (line["ratio_low"] <= line["ratio"]).all()
    assert (line["ratio_high"] >= line["ratio"]).all()


def test_limits_are_set_against_size_and_shape(trained: tuple[Path, Tables]) -> None:
    _, tables = trained
    rows = tables.training_limits
    assert set(rows["over"]) == {"non_embedding_parameters", "width_by_depth"}
    assert set(rows["models"]) == {2}
    # One of the two has no limit.
    assert not rows["resolved"].any()


def test_the_last_checkpoint_stands_for_a_training_among_models(
    trained: tuple[Path, Tables],
) -> None:
    _, tables = trained
    assert tables.earlier() == {f"a-{n}" for n in range(4)} | {"b-0"}
    assert set(tables.scaling["models"]) == {3}
    models = tables.models.set_index("model")
    assert list(models.loc["a-2", ["series", "checkpoint", "training_tokens"]]) == ["a", "2", 9e9]
    assert models.loc["c", "series"] == ""
