"""Prompt against generation, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_results import LAYERS, make_results, make_tables
from sparsity_atlas.figures.by_phase import phase_sparsity
from sparsity_atlas.figures.style import NothingToShow

LEVELS = ("0.97", "0.9", "0.8", "0.7", "0.6", "0.5")


def test_lines_are_layers_in_each_phase(tmp_path: Path) -> None:
    make_results(
        tmp_path,
        {"small": {}, "large": {"parameters": 9_000_000}},
        sites=("all_inputs",),
        levels=LEVELS,
        phases=("prompt", "generation"),
    )
    tables = make_tables(tmp_path)
    # Whatever else is read is of all phases together.
    assert set(tables.curves["phase"]) == set(tables.layers["phase"]) == {"all"}
    assert len(tables.layers) == 2 * len(LEVELS) * 2 * LAYERS
    assert len(tables.phases) == 2 * len(tables.layers)
    figure = phase_sparsity(tables)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        f"{model}\nall_inputs: {tensor}"
        for model in ("small", "large")
        for tensor in ("input", "intermediate")
    ]
    (names,) = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert names == ["prompt", "generation"]
    lines = figure.axes[0].lines
    # Four levels of six, the mildest and the harshest among them.
    assert len(lines) == 4 * 2
    prompt, generation = lines[-2:]
    share = 0.5**0.5
    assert list(prompt.get_ydata()) == pytest.approx([0.7 * share, 0.8 * share, 0.9 * share])
    assert list(generation.get_ydata()) == pytest.approx([0.8 * share, 0.9 * share, share])
    assert list(prompt.get_xdata()) == list(range(LAYERS))
    assert next(iter(lines[0].get_ydata())) == pytest.approx(0.7 * 0.03**0.5)


def test_one_phase_is_no_figure(tmp_path: Path) -> None:
    make_results(tmp_path, {"small": {}}, sites=("input",))
    tables = make_tables(tmp_path)
    assert tables.phases.empty
    assert isinstance(phase_sparsity(tables), NothingToShow)
