"""The report: self-contained, safe, right about its numbers, and there also when a run failed."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fake_results import make_results, make_tables
from sparsity_atlas.config.schema import parse
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.figures.draw import draw_all
from sparsity_atlas.figures.style import shows_nothing
from sparsity_atlas.report import page, report
from sparsity_atlas.report.failures import last_error, take_stock
from sparsity_atlas.report.published import PUBLISHED
from sparsity_atlas.tables.read import Tables, read_tables

CONFIG = {
    "models": {name: {"path": f"zoo/{name}"} for name in ("large", "small")},
    "criteria": {"topp": {"power": 1}},
    "texts": {"prose": {"file": "prose.txt"}},
    "tasks": {"prose": {}, "pairs": {}},
    "run": [{"models": ["large", "small"], "sites": ["input", "intermediate"]}],
}
SETTINGS = "# torch 2.13.0\n# snakemake 9.27.1\ncriteria:\n  topp: {power: 1}\n"


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\N{NO-BREAK SPACE}", " ")


def tables_of(results: Path, **shape) -> Tables:
    return make_tables(make_results(results, **shape))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Tables, list[Path]]:
    """Tables and figures of a finished run with a hostile name and a failed level."""
    results = tmp_path_factory.mktemp("results")
    tables = tables_of(
        results,
        models={
            "<script>x": {"parameters": 400_000, "source": {"path": "</script><b>"}},
            "qwen": {
                "parameters": 10**9,
                "source": {"hub": "Qwen/Qwen2.5-0.5B", "revision": "main"},
                "revision": "c0ffee",
                "tolerance": 5.0,
            },
        },
        sites=("intermediate", "all_inputs"),
        criteria=("topp", "topk"),
        tasks={
            "prose": {"kind": "loss"},
            "pairs": {"kind": "accuracy", "failed": ("0.5",)},
            "guess": {"kind": "accuracy", "chance": 0.5, "dense": 0.4},
        },
    )
    draw_all(tables, results / "figures")
    return tables, sorted((results / "figures").glob("*.svg"))


@pytest.fixture(scope="module")
def text(finished) -> str:
    return report.build(*finished, SETTINGS, None)


def test_the_page_loads_nothing_and_runs_nothing(text):
    parsed = Page(text)
    assert not parsed.open
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in parsed.tags}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text


def test_a_hostile_name_is_only_text(text):
    parsed = Page(text)
    assert "<script>x" in parsed.text
    assert "</script><b>" in parsed.text


def test_links_lead_somewhere_and_what_is_shown_is_named(text):
    parsed = Page(text)
    names = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {link["href"].removeprefix("#") for link in parsed.all("a")} <= set(names)
    assert all(image["alt"] for image in parsed.all("img"))
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in parsed.all("th"))
    assert all(
        table.get("aria-label") or table.get("aria-labelledby") for table in parsed.all("table")
    )


def test_every_figure_and_every_model_is_there(finished, text):
    tables, figures = finished
    parsed = Page(text)
    # No model of this run has experts or denoises, every criterion is uniform, tasks have one phase, no
    # layer is sparsified alone, no models are compared, and they are too few to be put in an order.
    empty = [
        "step_sparsity",
        "step_overlap",
        "step_layers",
        "twins",
        "foretelling",
        "training",
        "training_limits",
        "speed",
        "speed_parts",
        "speed_batch",
        "mask_recall",
        "cett",
        "local_dimension",
        "inserted",
        "inserted_gates",
        "prompt_overlap",
        "prompt_overlap_layers",
        "prompt_loss",
        "truthfulness",
        "phase_sparsity",
        "expert_sparsity",
        "expert_load",
        "step_sparsity",
        "step_overlap",
        "step_layers",
        "allocation_damage",
        "allocation",
        "single_layers",
    ]
    assert {path.stem for path in figures if shows_nothing(path.read_bytes())} == set(empty)
    headings = [one.get("id", "") for one in parsed.all("h3")]
    shown = [name for name in headings if name.startswith("figure-")]
    assert shown == [f"figure-{name}" for name in FIGURES if name not in empty]
    expected = len(shown) + len(report.MODEL_FIGURES) * len(tables.models)
    assert len(parsed.all("img")) == expected
    # Of experts it speaks only where there are some.
    titles = "; ".join(
        FIGURES[name].title for name in FIGURES if name in empty and FIGURES[name].missed
    )
    said = f"Left out, since this run has nothing to show in them: {titles}."
    assert parsed.text.count(said) == 1
    assert "revision c0ffee" in parsed.text


def test_pairs_that_cannot_be_set_side_by_side_are_named(finished, one_figure_a_model):
    config = (
        "run:\n- models: [qwen, <script>x]\n"
        "compare: [[qwen, <script>x], [away, qwen], [away, elsewhere]]\n"
    )
    tables, figures = finished
    figures = figures[:1]
    said = Page(report.build(tables, figures, SETTINGS + config, None)).text
    assert (
        "Not set side by side, though the configuration asks for it: qwen and <script>x (they have no "
        "curve in common); away and qwen (away is not in this run)."
    ) in said
    assert "side by side" not in Page(report.build(tables, figures, SETTINGS, None)).text


@pytest.fixture
def one_figure_a_model(monkeypatch):
    """Of a model's own figures the first, for what does not hang on how many they are."""
    monkeypatch.setattr(report, "MODEL_FIGURES", report.MODEL_FIGURES[:1])


def test_figures_that_were_not_drawn_are_left_out(finished, one_figure_a_model):
    tables, figures = finished
    kept = [path for path in figures if path.stem != "criteria"]
    parsed = Page(report.build(tables, kept, SETTINGS, None))
    assert "figure-criteria" not in [figure["id"] for figure in parsed.all("h3") if "id" in figure]
    assert f"show in them: {FIGURES['criteria'].title}; " in parsed.text


def test_headline_numbers_are_those_of_the_table(finished, text):
    tables, _ = finished
    shown = Page(text).text
    for task in ("prose", "average"):
        for row in tables.headline(task).itertuples():
            assert page.cell(row).value in shown
            assert page.cell(row).interval in shown
    groups = page.headline(tables, {"criteria": {"topp": {}}})
    assert [(g.criterion, g.model) for g in groups] == [
        ("topk", "<script>x"), ("topk", "qwen"), ("topp", "<script>x"), ("topp", "qwen"),
    ]  # fmt: skip
    assert [row.site for row in groups[0].rows] == ["intermediate", "all_inputs"]


def row(**other):
    about = {
        "kind": "loss", "relation": "=", "value": 0.4567, "interval_low": 0.4, "interval_high": 0.5,
        "low_open": False, "high_open": False, "resolved": True, "non_monotone": False,
    }  # fmt: skip
    return type("Row", (), {**about, **other})


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, page.Cell("45.7", "40 to 50")),
        ({"relation": ">=", "high_open": True}, page.Cell("≥ 45.7", "40 to >50")),
        ({"relation": "<", "low_open": True}, page.Cell("< 45.7", "<40 to 50")),
        ({"interval_low": 0.447}, page.Cell("45.7", "44.7 to 50")),
        ({"kind": "bound"}, page.Cell("45.7", "40 to 50", ("of a bound",))),
        # Outwards, as the ends themselves are.
        ({"interval_low": 0.4448, "interval_high": 0.5001}, page.Cell("45.7", "44.4 to 50.1")),
        ({"interval_low": float("nan")}, page.Cell("45.7")),
        (
            {"resolved": False, "non_monotone": True},
            page.Cell("45.7", "40 to 50", ("not resolved", "non-monotone")),
        ),
        ({"relation": "none", "value": float("nan")}, page.Cell("no value")),
    ],
)
def test_a_value_says_how_it_is_to_be_read(about, expected):
    assert page.cell(row(**about)) == expected


def test_what_the_context_cut_stands_beside_the_samples(finished):
    tables = finished[0]
    rows = tables.critical_sparsity.drop_duplicates("task").assign(items=1200, cut_items=0)
    rows["windowed_items"] = 0
    rows.iloc[0, rows.columns.get_loc("cut_items")] = 7
    rows.iloc[1, rows.columns.get_loc("windowed_items")] = 1100
    rows.iloc[0, rows.columns.get_loc("unfinished_items")] = 4
    rows.iloc[2, rows.columns.get_loc("unfinished_items")] = 5
    curves = tables.curves.copy()
    level = (curves["task"] == rows["task"].iloc[0]) & (curves["level"] == "0.5")
    curves.loc[level, "unfinished_items"] = 1100
    assert page.items(replace(tables, critical_sparsity=rows, curves=curves))[:3] == [
        "1,200 samples, 7 without their beginning, 4 answers cut at their budget of tokens (up to 1,100 at "
        "a level)",
        "1,200 samples, 1,100 in windows",
        "1,200 samples, 5 answers cut at their budget of tokens",
    ]


def published(groups) -> dict:
    return {
        (g.criterion, g.model, r.site): r.published.percent
        for g in groups
        for r in g.rows
        if r.published
    }


def test_published_values_stand_beside_the_papers_model_and_rule_only(finished):
    tables, _ = finished
    ours = {"criteria": {"topp": {"power": 1}, "topk": {}}}
    assert published(page.headline(tables, ours)) == {("topp", "qwen", "intermediate"): 46.54}
    # The names are the user's: what counts is the rule behind them.
    renamed = {"criteria": {"topp": {"rule": "topk"}, "topk": {"rule": "topp"}}}
    assert published(page.headline(tables, renamed)) == {("topk", "qwen", "intermediate"): 46.54}
    for other in ({"power": 2}, {"file": "mine.py"}):
        assert not published(page.headline(tables, {"criteria": {"topp": other}}))


def test_published_values_say_where_they_are_from(finished, text):
    assert "copied second-hand" in Page(text).text
    assert {
        one.source.startswith("read off a figure")
        for one in PUBLISHED["google/gemma-3-4b-pt"].values()
    } == {True}
    assert PUBLISHED["Qwen/Qwen2.5-32B-Instruct"]["up"].percent == 57.35
    assert PUBLISHED["google/gemma-3-27b-pt"]["all_inputs"].percent == 74.1


def test_levels_that_failed_numerically_are_listed(finished, text):
    shown = Page(text).text
    assert "NaN in model.layers.1.mlp" in shown
    assert "This run did not finish" not in shown
    assert page.numeric_failures(finished[0])[0]["levels"] == "0.5"


def test_versions_and_configuration_are_shown(text):
    assert page.split_config(SETTINGS)[0] == [("torch", "2.13.0"), ("snakemake", "9.27.1")]
    shown = Page(text).text
    assert "2.13.0" in shown
    assert "topp: {power: 1}" in shown


def test_the_same_run_gives_the_same_page(finished, text):
    assert report.build(*finished, SETTINGS, None) == text


def test_large_figures_become_pixels(finished, text, one_figure_a_model, monkeypatch):
    assert "data:image/png" not in text
    monkeypatch.setattr(report, "BUDGET", 1)
    small = report.build(*finished, SETTINGS, None)
    assert "data:image/png" in small
    assert "data:image/svg" not in small


# Runs that did not finish.


@pytest.fixture
def results(tmp_path) -> Path:
    models = {"small": {"parameters": 400_000}, "large": {"parameters": 6_400_000}}
    return make_results(tmp_path / "results", models)


@pytest.fixture
def drawn_before(finished, monkeypatch):
    """Figures of another run in place of this one's, for what does not hang on what they show."""

    def draw(tables: Tables, folder: Path) -> None:
        shutil.copytree(finished[1][0].parent, folder)

    monkeypatch.setattr(report, "draw_all", draw)
    return draw


def log(results: Path, output: str, text: str) -> None:
    path = (results / "logs" / output).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_run_that_left_nothing_gives_a_page(tmp_path):
    remains = report.partial(tmp_path / "results", CONFIG)
    assert (remains.curves, remains.failures, remains.asked) == ([], [], 4)
    shown = Page((tmp_path / "results/index.html").read_text()).text
    assert "0 of 4 curves are here" in shown
    assert "No curve was finished." in shown


def test_a_model_that_could_not_be_loaded_is_listed_and_its_old_curves_are_not_shown(
    results, drawn_before, one_figure_a_model
):
    (results / "large/model.json").unlink()
    log(results, "large/model.json", "loading\nerror: zoo/large: no such folder\n")
    remains = report.partial(results, CONFIG)
    assert [Path(one.output).parts[-2:] for one in remains.failures] == [("large", "model.json")]
    assert remains.failures[0].reason == "zoo/large: no such folder"
    parsed = Page((results / "index.html").read_text())
    assert "zoo/large: no such folder" in parsed.text
    assert "2 of 4 curves are here" in parsed.text
    assert "model-large" not in {attributes.get("id") for _, attributes in parsed.tags}
    assert read_tables(sorted(results.glob("partial/*.csv"))).by_size() == ["small"]


def test_a_partial_report_leaves_what_snakemake_made_and_takes_away_one_file(
    results, drawn_before, one_figure_a_model
):
    """Without headline.csv Snakemake knows that the page is not the finished run's."""
    drawn_before(make_tables(results), results / "figures")
    (results / "headline.csv").write_text("old\n")
    before = {
        path: path.read_bytes() for path in [*results.glob("*.csv"), *results.glob("figures/*")]
    }
    (results / "large/model.json").unlink()
    report.partial(results, CONFIG)
    after = {
        path: path.read_bytes() for path in [*results.glob("*.csv"), *results.glob("figures/*")]
    }
    assert before.pop(results / "headline.csv")
    assert after == before
    assert (results / "partial/headline.csv").read_text().count("\n") == 1 + 2


@pytest.mark.parametrize(
    "lost", ["dense/eval.json", "topp/input/search.json", "topp/input/curve.json"]
)
def test_a_curve_counts_only_with_all_that_it_was_made_from(results, lost):
    (results / "small" / lost).unlink()
    remains = take_stock(results, parse(CONFIG))
    assert results / "small/topp/input/curve.json" not in remains.curves
    assert results / "large/topp/input/curve.json" in remains.curves
    assert [str(results / "small" / lost)] == remains.not_started
    assert len(remains.models) == 2


def test_metrics_and_output_errors_are_shown_before_there_is_any_curve(results):
    for path in results.glob("*/*/*/curve.json"):
        path.unlink()
    remains = report.partial(results, CONFIG)
    assert not remains.curves
    assert len(remains.sparsity) == len(remains.metrics) == 4
    assert (results / "partial/figures/output_error.svg").stat().st_size > 10_000


def test_a_damaged_manifest_is_a_failure_of_its_own(results):
    damaged = results / "small/topp/input/curve.json"
    damaged.write_text("{")
    remains = take_stock(results, parse(CONFIG))
    assert [(one.output, "damaged" in one.reason) for one in remains.failures] == [
        (str(damaged), True)
    ]
    assert len(remains.curves) == 3


def test_a_failed_nodes_level_of_a_listed_curve_is_named(results):
    block = {"models": ["small"], "sites": ["input"], "levels": ["0.9", "0.25"]}
    log(results, "small/topp/input/0.25/eval.json", "Traceback\nKeyError: 'x'\n")
    remains = take_stock(results, parse({**CONFIG, "run": [block]}))
    assert [(Path(one.output).parts[-2], one.reason) for one in remains.failures] == [
        ("0.25", "KeyError: 'x'")
    ]
    assert not remains.curves


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("step 1\nerror: config: no\nstep 2\n", "config: no"),
        (
            "Traceback:\n  File\ntorch.OutOfMemoryError: no room\n\n",
            "torch.OutOfMemoryError: no room",
        ),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("3 of 7 done\n", "stopped without an error message; the log's last line: 3 of 7 done"),
        ("", "stopped without an error message; its log is empty"),
    ],
)
def test_the_reason_is_the_logs_last_error(tmp_path, content, expected):
    path = tmp_path / "x.log"
    path.write_text(content)
    assert last_error(path) == expected


def test_no_log_no_reason(tmp_path):
    assert last_error(tmp_path / "x.log") == ""


def test_the_command_line(results, monkeypatch, tmp_path, caplog):
    arguments = ["report", "partial", "--results", str(results), "--config", json.dumps(CONFIG)]
    monkeypatch.setattr("sys.argv", arguments)
    with caplog.at_level(logging.INFO, "sparsity_atlas"):
        report.main()
    # A terminal shows it behind the errors of the run.
    curves = len(list(results.glob("*/*/*/curve.json")))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(
        f"{results / 'index.html'}: {curves} of {curves} curves; 0 outputs failed"
    )
    unfinished = (results / "index.html").read_text()
    assert "This run did not finish" not in unfinished, "nothing was missing"

    settings = tmp_path / "run_config.yaml"
    settings.write_text(report.render(parse(CONFIG)))
    make_tables(results)
    monkeypatch.setattr(
        "sys.argv",
        [
            *("report", "page", "--tables", *map(str, sorted(results.glob("*.csv")))),
            *("--figures", *map(str, sorted(results.glob("partial/figures/*.svg")))),
            *("--config", str(settings), "--output", str(results / "index.html")),
            *("--headline", str(results / "headline.csv")),
            *("--published", str(results / "published.csv")),
        ],
    )
    report.main()
    finished = (results / "index.html").read_text()
    assert finished == unfinished.replace("<code>partial/figures/", "<code>figures/")
    assert not (results / "partial").exists()
    with (results / "headline.csv").open() as file:
        shown = {(one["model"], one["site"]): one["ppl_sparsity"] for one in csv.DictReader(file)}
    tables = read_tables(sorted(results.glob("*.csv")))
    headline = tables.headline("prose").itertuples()
    assert shown == {(row.model, row.site): page.cell(row).value for row in headline}


def test_targets_that_were_not_reached_are_told(finished: tuple) -> None:
    tables = finished[0]
    layers = tables.layers.assign(target_of="sparsity", target=0.9, reached=0.9)
    # Of two tensors one: what a layer reaches with both together does not hide it.
    first = (layers["layer"] == 0) & (layers["tensor"] == "intermediate")
    layers.loc[first, "reached"] = 0.83
    told = page.missed_targets(replace(tables, layers=layers))
    by_site = {row["site"]: row["layers"] for row in told}
    assert by_site == {
        "intermediate": "0: 83.0 % of 90.0 %",
        "all_inputs": "intermediate 0: 83.0 % of 90.0 %",
    }
    keys = [tuple(row[name] for name in ("model", "criterion", "site", "level")) for row in told]
    assert len(set(keys)) == len(keys)
    assert not page.missed_targets(tables)
