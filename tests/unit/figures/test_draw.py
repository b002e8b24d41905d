"""Figures of runs of every shape: what they must show, and that they are the same every time."""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fake_results import make_results, make_tables
from sparsity_atlas.activations import metrics
from sparsity_atlas.figures import (
    FIGURES,
    by_expert,
    by_layer,
    by_task,
    critical_points,
    differences,
    model_size,
    panels,
    score_curves,
    style,
)
from sparsity_atlas.figures.draw import DRAW, draw_all
from sparsity_atlas.figures.studies import rank_correlations
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.report.page import headline
from sparsity_atlas.tables.read import SITE_ORDER, Tables, in_order, read_csv

ROOT = Path(__file__).parents[3]
SIZES = {"small": 400_000, "medium": 1_600_000, "large": 6_400_000}


def tables_of(results: Path, **shape) -> Tables:
    make_results(results, **shape)

    return make_tables(results)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tables:
    """Three sizes of one family and a twin of another, two criteria, all sites."""
    models = {name: {"parameters": size} for name, size in SIZES.items()}
    models["twin"] = {"parameters": SIZES["medium"], "activation": "relu", "tolerance": 0.9}
    return tables_of(
        tmp_path_factory.mktemp("plain"), models=models, sites=SITE_ORDER, criteria=("topp", "topk")
    )


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Tables:
    """All that can be missing: dense at chance, no intervals, failed levels, nothing below the bar."""
    return tables_of(
        tmp_path_factory.mktemp("bad"),
        models={"m": {"tolerance": 5.0}},
        sites=("intermediate",),
        tasks={
            "guess": {"kind": "accuracy", "chance": 0.5, "dense": 0.45},
            "one": {"kind": "loss", "clusters": 1},
            "nan": {"kind": "accuracy", "failed": ("0.5",)},
            "easy": {"kind": "accuracy", "items": 2500},
        },
    )


def words(figure: Figure) -> str:
    """Everything written in a figure."""
    return "\n".join(
        text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))
    )


def test_every_figure_is_drawn_and_has_a_caption_in_snakemakes_report():
    assert list(DRAW) == list(FIGURES)
    for name, figure in FIGURES.items():
        caption = (ROOT / f"workflow/report/{name}.rst").read_text()
        assert caption == f"{{{{ snakemake.params.captions.{name} }}}}\n"
        assert not set("*`|_") & set(figure.caption.replace("all_inputs", "")), "special in rst"
        assert set(figure.tables) <= set(Tables.__dataclass_fields__)


SHAPES = {
    "nothing": {"models": {}},
    "one level": {
        "models": {"m": {}},
        "sites": ("input",),
        "levels": ("0.9",),
        "tasks": {"acc": {"kind": "accuracy", "items": 20, "chance": 0.25}},
    },
    "loss only": {
        **{"models": {"a": {}, "b": {}}, "sites": ("input",)},
        "tasks": {"text": {"kind": "loss"}},
    },
    "a name that mathematics would spoil": {
        **{"models": {"a$b_c^d$": {}}, "criteria": ("x" * 60,), "sites": ("input",)},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_every_file(shape, tmp_path):
    tables = tables_of(tmp_path / "results", **SHAPES[shape])
    with warnings.catch_warnings(action="error", category=UserWarning):
        draw_all(tables, tmp_path / "figures")
    files = {f"{name}.{suffix}" for name in FIGURES for suffix in style.SUFFIXES}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files


def test_the_same_tables_give_the_same_bytes_without_date_or_version(bad, tmp_path):
    # These tables also lack all that can be missing, which must stop no figure.
    draw_all(bad, tmp_path / "a")
    draw_all(bad, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert b"<dc:date>" not in content
        assert b"<dc:creator>" not in content
        assert b"Software" not in content


def test_a_site_looks_the_same_whatever_else_was_measured():
    every = style.marks(SITE_ORDER)
    for site in SITE_ORDER:
        assert style.marks([site]) == {site: every[site]}
    looks = {(mark.marker, str(mark.dashes)) for mark in every.values()}
    assert len(looks) == len(every), "sites must differ without colour"


def test_two_criteria_never_look_alike():
    names = ["topp", "topk", "maxp", "fat", "wina", "cett", "chess", "mine"]
    assert len({(mark.color, mark.marker) for mark in style.marks(names).values()}) == len(names)


def test_bounds_are_not_called_losses(tmp_path):
    bounds = {"text": {"kind": "bound"}}
    tables = tables_of(tmp_path, models={"a": {}}, criteria=("topp", "topk"), tasks=bounds)
    drawn = [
        *(score_curves.added_loss, score_curves.criteria, score_curves.all_tasks),
        *(differences.differences, critical_points.ppl_sparsity),
    ]
    with style.styled():
        for draw in drawn:
            said = words(draw(tables)).lower()
            assert "bound" in said, draw
            assert "loss" not in said, draw


def test_harsh_levels_do_not_squash_the_bar(tmp_path):
    tables = tables_of(tmp_path, models={"m": {"tolerance": 0.15}}, levels=("0.99", "0.5", "0"))
    assert tables.curves["added_loss"].max() > 10
    with style.styled():
        ax = score_curves.added_loss(tables).axes[0]
        low, bar, high = ax.transData.transform([(0, ax.get_ylim()[0]), (0, score_curves.ALLOWED_LOSS),
                                                 (0, ax.get_ylim()[1])])[:, 1]  # fmt: skip
    assert 0.15 < (bar - low) / (high - low) < 0.85
    with style.styled():
        ax = score_curves.retained_accuracy(tables).axes[0]
    assert 0.75 < ax.get_ylim()[0] < 0.99 < ax.get_ylim()[1]


def test_curves_show_the_numbers_of_the_table(plain):
    with style.styled():
        figure = score_curves.added_loss(plain)
    ax = next(ax for ax in figure.axes if ax.get_title() == "small · topp")
    rows = plain.curves.query(
        "model == 'small' and criterion == 'topp' and site == 'gate' and task == 'prose'"
    ).sort_values("sparsity")
    color = style.SITE_MARKS["gate"].color
    lines = [line for line in ax.lines if to_rgb(line.get_color()) == to_rgb(color)]
    shown = {line.get_marker(): line for line in lines}
    np.testing.assert_allclose(shown["^"].get_xdata(), rows["sparsity"])
    np.testing.assert_allclose(shown["^"].get_ydata(), rows["added_loss"])
    np.testing.assert_allclose(shown["None"].get_ydata(), rows["fitted"])


def test_a_failed_level_is_a_cross_on_the_edge(bad):
    with style.styled():
        figure = score_curves.all_tasks(bad)
    ax = next(ax for ax in figure.axes if ax.get_title() == "nan")
    (crosses,) = (line for line in ax.lines if line.get_marker() == "x")
    failed = bad.curves.query("task == 'nan' and status == 'failed'")
    assert len(failed) == 1
    np.testing.assert_allclose(crosses.get_xdata(), failed["sparsity"])


def test_points_say_how_they_are_to_be_read(bad):
    with style.styled():
        figure = critical_points.critical_sparsity(bad)
        assert "at least: never below the bar" not in words(
            critical_points.ppl_sparsity(bad.of("none"))
        )
    row = bad.headline("average").iloc[0]
    marker = {"=": "o", ">=": ">", "<": "<"}[row["relation"]]
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == marker]
    assert [list(line.get_xdata()) for line in drawn] == [[row["value"]]]
    assert (drawn[0].get_markerfacecolor() == "white") == (not row["resolved"])


def test_a_figure_in_which_nothing_has_a_value_shows_nothing(tmp_path, bad):
    """A frame whose only row says "no value" would be an empty one; one row that has a value is none."""
    guess = {"guess": {"kind": "accuracy", "chance": 0.5, "dense": 0.45}}
    tables = tables_of(tmp_path, models={"m": {}}, sites=("input",), tasks=guess)
    assert set(tables.critical_sparsity["relation"]) == {"none"}
    with style.styled():
        for figure in (critical_points.critical_sparsity, by_task.tasks):
            assert isinstance(figure(tables), style.NothingToShow)
            assert not isinstance(figure(bad), style.NothingToShow)
        # Dense accuracy is 0, so that no share of it is left.
        lost = replace(tables, curves=tables.curves.assign(retained=np.nan, status="ok"))
        assert isinstance(score_curves.retained_accuracy(lost), style.NothingToShow)
        assert not isinstance(score_curves.retained_accuracy(tables), style.NothingToShow)


def test_a_task_at_chance_has_no_value_in_the_heatmap(bad):
    with style.styled():
        figure = by_task.tasks(bad)
    cells = [text.get_text() for text in figure.axes[0].texts]
    order = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert cells[order.index("guess")] == "–"
    assert cells[order.index("easy")].startswith("≥")


def test_cells_of_the_heatmap_have_intervals_that_hold_their_values(bad):
    rows = bad.critical_sparsity.assign(
        value=0.4446, relation="=", interval_low=0.4446, interval_high=0.5041, high_open=True
    )
    with style.styled():
        figure = by_task.tasks(replace(bad, critical_sparsity=rows))
    assert {text.get_text() for text in figure.axes[0].texts} == {"44.5\n44–>51"}


def test_only_what_is_resolved_is_coloured(bad):
    with style.styled():
        values = by_task.tasks(bad).axes[0].collections[0].get_array().reshape(-1)
    headline = bad.critical_sparsity.query("bar == 0.99")
    resolved = headline["resolved"] & (headline["relation"] != "none")
    assert np.ma.count(np.ma.masked_invalid(values)) == resolved.sum()


def slopes(figure: Figure) -> int:
    """Lines drawn from one model's size to another's."""
    return sum(
        len(line.get_xdata()) == 2 and line.get_marker() == "None"
        for ax in figure.axes
        for line in ax.lines
    )


def test_a_mixture_stands_where_its_active_parameters_are(tmp_path: Path) -> None:
    sizes = {"small": {"parameters": 10**6}, "mixture": {"parameters": 10**8, "active": 10**5}}
    tables = tables_of(tmp_path, models=sizes, sites=("intermediate",), criteria=("topp",))
    with style.styled():
        figure = model_size.scaling(tables)
    assert "active non-embedding parameters" in words(figure)
    places = {
        float(x) for ax in figure.axes for line in ax.lines for x in line.get_xdata(orig=False)
    }
    assert places == {10.0**6, 10.0**5}


def test_a_site_in_some_parts_is_shown_as_it_is_spelled(tmp_path: Path) -> None:
    """In the plain site's colour, behind it, and with another marker than any other."""
    sites = ("input@experts", "intermediate@shared+experts", "intermediate", "intermediate@experts")
    tables = tables_of(
        tmp_path, models={"m": {}}, sites=sites, criteria=("topp", "topk"), levels=("0.9", "0.5")
    )
    ordered = ["intermediate", "intermediate@experts", "intermediate@shared+experts"]
    assert in_order(sites) == [*ordered, "input@experts"]
    found = style.marks(in_order(sites))
    assert {found[site].color for site in ordered} == {style.SITE_MARKS["intermediate"].color}
    assert len({found[site].marker for site in ordered}) == 3
    with style.styled():
        for name, draw in DRAW.items():
            drawn = draw(tables)
            if name in ("added_loss", "criteria", "tasks", "layer_sparsity", "output_error"):
                assert all(site in words(drawn) for site in sites), name
    assert [group.site for group in headline(tables, {})[0].rows] == in_order(sites)


def test_a_line_is_drawn_exactly_where_the_slope_is_resolved(plain):
    fits = plain.scaling
    shown = fits[(fits["bar"] == 0.99) & fits["task"].isin(["prose", "average"])]
    with style.styled():
        figure = model_size.scaling(plain)
        flat = plain.scaling.assign(resolved=False)
        without = model_size.scaling(Tables(**{**vars(plain), "scaling": flat}))
        every = plain.scaling.assign(resolved=True, low=0.1, high=0.2)
        with_all = model_size.scaling(Tables(**{**vars(plain), "scaling": every}))
    assert slopes(figure) == shown["resolved"].sum()
    assert slopes(without) == 0
    assert slopes(with_all) == len(shown)
    said = words(without).replace("\n", " ")
    assert "3 models" in said
    assert said.count("slope not resolved: intermediate, input, gate, up, all_inputs") == 4


def test_the_twin_with_another_activation_is_on_no_line(plain):
    assert set(plain.scaling["models"]) == {3}
    assert set(plain.scaling["family"]) == {"LlamaForCausalLM, silu"}
    with style.styled():
        assert "one model only, not shown: LlamaForCausalLM, relu" in words(
            model_size.scaling(plain)
        )


def test_many_models_fit_on_a_page_and_the_figure_says_what_is_left_out(tmp_path):
    models = {
        f"an-organisation_with-a-long-name-{i}b-instruct-v0.{i}": {
            **{"parameters": 10**6 * (i + 1), "experts": True}
        }
        for i in range(50)
    }
    tables = tables_of(tmp_path, models=models, sites=("input",), levels=("0.9", "0.5"))
    with style.styled():
        for name, draw in DRAW.items():
            figure = draw(tables)
            width, height = figure.get_size_inches()
            assert width <= style.WIDE, name
            assert height <= style.TALL + 0.6, name
            if name not in (
                "scaling",
                "criteria",
                "comparison",
                "comparison_error",
                "allocation_damage",
                "allocation",
                "single_layers",
                "phase_sparsity",
                "step_sparsity",
                "step_overlap",
                "step_layers",
                "twins",
                # One panel for all models, and what was not asked for.
                "foretelling",
                "training",
                "training_limits",
                "speed",
                "speed_parts",
                "speed_batch",
                "mask_recall",
                "cett",
                "local_dimension",
                "layer_profile",
                "inserted",
                "inserted_gates",
                "prompt_overlap",
                "prompt_overlap_layers",
                "prompt_loss",
                "truthfulness",
            ):
                notes = " ".join(text.get_text() for text in figure.texts)
                assert re.search(r"\d+ of 50 shown", notes), name


def test_a_long_note_stays_within_its_figure():
    figure, _ = panels.grid(1)
    panels.label(
        figure, "x", note="one model only, not shown: " + "; ".join(["a long family"] * 20)
    )
    figure.canvas.draw()
    (written,) = [text for text in figure.texts if "not shown" in text.get_text()]
    box = written.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize("panels_drawn", [1, 4, 12])
def test_the_label_of_the_y_axis_is_no_taller_than_the_panels(panels_drawn: int) -> None:
    figure, axes = panels.grid(panels_drawn, height=2.0)
    panels.legend(figure, style.marks(["a", "b"]), panels.rule("independent neurons"))
    for ax in axes:
        ax.set_title("a model of some name\nand what of it")
    what = "neurons that are kept so often at most, at each of several levels (%)"
    panels.label(figure, "x", what)
    figure.canvas.draw()
    (written,) = [text for text in figure.texts if "neurons" in text.get_text()]
    box = written.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= max(ax.get_tightbbox().y1 for ax in axes)


def test_a_figure_is_laid_out_as_where_it_is_drawn_twice(bad):
    """And stays so: to draw it takes longer than to lay it out."""
    with style.styled():
        laid_out, drawn = (by_layer.layer_sparsity(bad) for _ in range(2))
        style.arrange(laid_out)
        for _ in range(2):
            drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
        assert style.to_svg(laid_out) == style.to_svg(drawn)


def test_a_figure_that_is_laid_out_is_drawn_once(plain, monkeypatch):
    """With a layout engine, also one that does nothing, saving draws all of it once more."""
    draws = []
    with style.styled():
        figure = score_curves.criteria(plain)
        style.arrange(figure)
        draw = figure.draw
        monkeypatch.setattr(figure, "draw", lambda renderer: (draws.append(1), draw(renderer)))
        style.to_svg(figure)
    assert len(draws) == 1


def test_the_legend_has_no_criterion_that_no_panel_shows(tmp_path):
    tables = tables_of(
        tmp_path, models={"m": {}}, sites=("input",), criteria=("topp", "topk", "prompt_mask")
    )
    task, curves = tables.loss_task(), tables.curves
    # Asked of other tasks alone.
    kept = (curves["criterion"] != "prompt_mask") | (curves["task"] != task)
    some = replace(tables, curves=curves[kept])
    with style.styled():
        every, fewer = score_curves.criteria(tables), score_curves.criteria(some)
    names = [[text.get_text() for text in one.legends[0].get_texts()] for one in (every, fewer)]
    assert "prompt_mask" in names[0]
    assert names[1] == [name for name in names[0] if name != "prompt_mask"]


def test_a_selection_keeps_both_ends():
    kept, note = panels.select(list(range(50)), 7)
    assert kept[0] == 0
    assert kept[-1] == 49
    assert len(set(kept)) == 7
    assert note.startswith("7 of 50 shown")
    assert panels.select([1, 2], 7) == ([1, 2], "")


def test_layers_stand_in_the_order_of_the_sparsity_they_induce(plain):
    with style.styled():
        ax = by_layer.layer_sparsity(plain.of("small")).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.97", "0.9", "0.75", "0.5"]
    shares = ax.collections[0].get_array()
    assert (np.diff(shares, axis=1) > 0).all()


def test_long_names_keep_both_ends():
    assert style.shorten("short", 10) == "short"
    cut = style.shorten("organisation-model-70b-instruct", 15)
    assert len(cut) == 15
    assert cut.startswith("organi")
    assert cut.endswith("instruct"[-7:])
    assert style.heading("m" * 20, "c" * 20, width=27) == "m" * 20 + "\n" + "c" * 20


def test_names_that_look_like_numbers_stay_names(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text(
        "model,criterion,level,parameters,resolved\nnan,001,0.90,7,true\n1e3,NA,1,,false\n"
    )
    frame = read_csv(path)
    assert frame["model"].tolist() == ["nan", "1e3"]
    assert frame["criterion"].tolist() == ["001", "NA"]
    assert frame["level"].tolist() == ["0.90", "1"]
    assert frame["resolved"].tolist() == [True, False]
    assert frame["parameters"].iloc[0] == 7
    assert np.isnan(frame["parameters"].iloc[1])


def test_parts_of_a_mixture_have_panels_of_their_own(tmp_path: Path) -> None:
    """Of experts the mean and what lies between them, of those with enough rows; the dense model as ever."""
    alone = make_results(tmp_path / "alone", {"dense": {}}, sites=("intermediate",))
    before = make_tables(alone)
    results = make_results(tmp_path / "r", {"dense": {}, "mix": {}}, sites=("intermediate",))
    rng = np.random.default_rng(0)
    row = metrics.layer_metrics(rng.standard_normal((40, 16)).astype(np.float32))
    few = {"tokens": 3, "width": 16}
    rows = [
        {"tensor": "intermediate", "layer": 0, "part": "ffn", **row},
        {"tensor": "intermediate", "layer": 1, "part": "shared", **row},
        *(
            {
                **{"tensor": "intermediate", "layer": 1, "part": "experts", "expert": expert},
                **{**row, "effective_rank_share": share},
            }
            for expert, share in enumerate((0.2, 0.6))
        ),
        {"tensor": "intermediate", "layer": 1, "part": "experts", "expert": 2, **few},
    ]
    table = pa.Table.from_pylist(rows, metrics.SCHEMA_OF_PARTS)
    write_parquet(results / "mix/metrics/intermediate.parquet", table)
    tables = make_tables(results)
    assert list(tables.metrics.columns) == [*before.metrics.columns, "part", "expert"]
    assert list(tables.magnitudes.columns) == [*before.magnitudes.columns, "part"]
    assert set(tables.metrics.query("model == 'dense'")["part"]) == {"ffn"}
    own = tables.metrics.query("model == 'mix' and part == 'experts'")
    assert own["expert"].tolist() == [0, 1, 2]
    assert own["tokens"].tolist() == [40, 40, 3]
    assert own["gini"].isna().tolist() == [False, False, True]
    shares = tables.magnitudes.query("model == 'mix'").groupby("part")["share"].sum()
    assert shares.to_dict() == pytest.approx({"ffn": 1, "shared": 1, "experts": 1})
    for draw in (by_layer.effective_rank, by_layer.magnitudes):
        titles = [ax.get_title() for ax in draw(tables).axes]
        assert titles == ["dense", "mix", "mix · shared", "mix · experts"]
    (line,) = by_layer.effective_rank(tables).axes[3].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [pytest.approx(0.4)])


def test_headings_of_eight_sites_stay_within_the_figure_and_apart(plain):
    with style.styled():
        figure = critical_points.ppl_sparsity(plain)
        style.arrange(figure)
        boxes = [ax.title.get_window_extent() for ax in figure.axes]
        assert [ax.title.get_text().replace("\n", "") for ax in figure.axes] == list(SITE_ORDER)
        assert max(box.x1 for box in boxes) <= figure.bbox.x1
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("site", "tensor", "lines"),
    [
        ("input", "input", ["input, topp 0.75"]),
        ("all_inputs", "input", ["all_inputs: input, topp 0.75"]),
        ("all_inputs", "intermediate", ["all_inputs: intermediate", "topp 0.75"]),
        ("all_linear_inputs", "o_input", ["all_linear_inputs: o_input", "topp 0.75"]),
        ("all_linear_inputs", "intermediate", ["all_linear_inputs:", "intermediate", "topp 0.75"]),
    ],
)
def test_what_a_panel_shows_is_no_wider_than_it(site, tensor, lines):
    assert panels.at_level(site, tensor, "topp", "0.75").split("\n") == lines


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("input", ["input"]),
        ("all_linear_inputs", ["all_linear_", "inputs"]),
        ("intermediate@shared+experts", ["intermediate@", "shared+", "experts"]),
    ],
)
def test_names_are_broken_where_their_words_end(name, lines):
    assert style.broken(name, 12).split("\n") == lines


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Tables:
    """A mixture beside two dense models."""
    return tables_of(
        tmp_path_factory.mktemp("routed"),
        models={"moe": {"experts": True}, "a": {"parameters": 10**5}, "b": {}},
        sites=("intermediate", "all_inputs"),
        criteria=("topp", "topk"),
    )


FIRST = "criterion == 'topk' and site == 'intermediate' and level == '0.75'"


def test_experts_stand_beside_the_layers_of_dense_models(routed):
    figure = by_expert.spread(routed)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        f"moe\n{what}{criterion} 0.75"
        for criterion in ("topk", "topp")
        for what in ("intermediate, ", "all_inputs: intermediate\n", "all_inputs: input, ")
    ]
    rows = routed.experts.query(FIRST)
    layers = routed.layers.query(FIRST)
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata())]
    # A box has two whiskers, two caps and a median, in the order of the layers.
    for layer, own in rows.groupby("layer"):
        box = np.concatenate(drawn[5 * int(layer) : 5 * int(layer) + 5])
        assert box.min() == pytest.approx(own["sparsity"].min())
        assert box.max() == pytest.approx(own["sparsity"].max())
        assert own["sparsity"].median() == pytest.approx(drawn[5 * int(layer) + 4][0])
    dense = [list(line) for line in drawn[5 * rows["layer"].nunique() :]]
    assert dense == [list(layers[layers["model"] == name]["sparsity"]) for name in ("a", "b")]


def test_beside_experts_stand_models_of_their_kind(routed):
    """A masked-diffusion model's passes are over masks: what they drop is no measure of a causal mixture."""
    kinds = {"moe": "causal", "a": "diffusion", "b": "causal"}
    models = routed.models.assign(kind=routed.models["model"].map(kinds))
    (layers,) = by_expert.spread(replace(routed, models=models)).axes[0].lines[-1:]
    names = words(by_expert.spread(replace(routed, models=models))).split("\n")
    assert "b" in names
    assert "a" not in names
    own = routed.layers.query(FIRST + " and model == 'b'")
    assert list(layers.get_ydata()) == list(own["sparsity"])


def test_one_layer_of_experts_has_one_tick(routed):
    alone = {"experts": routed.experts.query("layer == 1"), "layers": routed.layers[:0]}
    figure = by_expert.spread(replace(routed, **alone))
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1]


def test_sparsity_stands_over_load(routed):
    figure = by_expert.load(routed)
    rows = routed.experts.query(FIRST)
    (points,) = figure.axes[0].collections
    reached = rows[rows["load"] > 0]
    assert len(reached) < len(rows)
    shown = np.asarray(points.get_offsets())
    np.testing.assert_allclose(shown, reached[["load", "sparsity"]].to_numpy())
    # Of eight experts each token meets two.
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([0.25, 0.25])


def test_without_dense_models_experts_stand_alone(tmp_path):
    tables = tables_of(tmp_path, models={"moe": {"experts": True}}, sites=("input",))
    figure = by_expert.spread(tables)
    assert [ax.get_title() for ax in figure.axes] == ["moe\ninput, topp 0.75"]


def test_experts_of_the_baseline_alone_are_no_figure(routed):
    # As where no node of a mixture has ended yet, or all have failed.
    dense = replace(routed, experts=routed.experts.query("level == 'dense'"))
    assert len(dense.experts)
    for draw in (by_expert.spread, by_expert.load):
        assert "No node of a mixture of experts" in words(draw(dense))


def test_experts_of_dense_models_are_no_figure(plain):
    for draw in (by_expert.spread, by_expert.load):
        assert isinstance(draw(plain), style.NothingToShow)


def test_numbers_that_foretell_stand_in_rows_of_their_own_and_others_have_none(plain):
    about = {"criterion": "topp", "site": "input", "measure": "ppl_sparsity", "resolved": True}
    rows = pd.DataFrame(
        [
            {**about, "metric": "gini", "correlation": 0.5, "low": 0.25, "high": 0.75},
            {**about, "metric": "lid", "correlation": None, "low": None, "high": None},
            {**about, "metric": "reuse", "correlation": -0.5, "low": -1.0, "high": 0.0},
        ]
    )
    (ax,) = rank_correlations.foretelling(replace(plain, foretelling=rows)).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["gini", "reuse"]
    places = ax.get_yticks()
    drawn = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata()) == 1]
    assert drawn == [[[0.5, places[0]]], [[-0.5, places[1]]]]
