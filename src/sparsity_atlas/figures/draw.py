"""Stage `figures`: draw every figure of a run from its tables, as SVG and PNG."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure

from sparsity_atlas.figures import (
    by_expert,
    by_layer,
    by_phase,
    by_step,
    by_task,
    critical_points,
    differences,
    layer_by_level,
    model_size,
    score_curves,
    twin_curves,
)
from sparsity_atlas.figures.studies import (
    cett_curve,
    inserted,
    layer_profile,
    local_dimension,
    neurons,
    prompt_overlap,
    rank_correlations,
    recall,
    single_layers,
    speedups,
    training_curves,
    truth_by_layer,
)
from sparsity_atlas.figures.style import SUFFIXES, arrange, save, styled
from sparsity_atlas.progress import told
from sparsity_atlas.tables.read import Tables, read_tables

# Which function draws which figure of the catalogue.
DRAW: dict[str, Callable[[Tables], Figure]] = {
    "ppl_sparsity": critical_points.ppl_sparsity,
    "critical_sparsity": critical_points.critical_sparsity,
    "scaling": model_size.scaling,
    "foretelling": rank_correlations.foretelling,
    "training": training_curves.training,
    "training_limits": training_curves.limits,
    "speed": speedups.whole,
    "speed_parts": speedups.parts,
    "speed_batch": speedups.batch,
    "added_loss": score_curves.added_loss,
    "retained_accuracy": score_curves.retained_accuracy,
    "criteria": score_curves.criteria,
    "comparison": differences.differences,
    "twins": twin_curves.twins,
    "comparison_error": differences.output_errors,
    "tasks": by_task.tasks,
    "inserted": inserted.scores,
    "inserted_gates": inserted.gates,
    "layer_sparsity": by_layer.layer_sparsity,
    "layer_profile": layer_profile.layer_profile,
    "phase_sparsity": by_phase.phase_sparsity,
    "expert_sparsity": by_expert.spread,
    "expert_load": by_expert.load,
    "step_sparsity": by_step.sparsity,
    "step_overlap": by_step.overlap,
    "step_layers": by_step.by_layer,
    "single_layers": single_layers.single_layers,
    "sensitivity": layer_by_level.sensitivity,
    "allocation_damage": layer_by_level.damage,
    "allocation": layer_by_level.own_sparsity,
    "output_error": by_layer.output_error,
    "unused_neurons": neurons.unused,
    "mask_reuse": neurons.reuse,
    "position_sparsity": neurons.position,
    "neuron_frequency": neurons.frequency,
    "prompt_overlap": prompt_overlap.overlap,
    "prompt_overlap_layers": prompt_overlap.by_layer,
    "prompt_loss": prompt_overlap.losses,
    "mask_recall": recall.recall,
    "cett": cett_curve.cett,
    "local_dimension": local_dimension.local_dimension,
    "truthfulness": truth_by_layer.truthfulness,
    "effective_rank": by_layer.effective_rank,
    "magnitudes": by_layer.magnitudes,
}


def draw_all(tables: Tables, folder: Path, names: Iterable[str] = tuple(DRAW)) -> None:
    """Write figures into a folder, by default all of them."""
    whole = tables.without_single_layers()
    with styled():
        for name in told(list(names), "drawn", "figures"):
            # A panel or a line for each of many layers would hide all others; what ARM does to texts before
            # the prompts may stand there alone.
            alone = name == "single_layers" or (name == "inserted" and whole.inserted.empty)
            figure = DRAW[name](tables if alone else whole)
            arrange(figure)
            for suffix in SUFFIXES:
                save(figure, folder / f"{name}.{suffix}")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas figures", description=__doc__)
    parser.add_argument("--tables", required=True, nargs="+", type=Path, help="the run's CSV files")
    parser.add_argument("--output", required=True, type=Path, help="folder for the figures")
    parser.add_argument(
        "--names", nargs="+", choices=DRAW, default=list(DRAW), help="of the figures; unset: all"
    )
    arguments = parser.parse_args()
    # Of an earlier run that had more to show.
    for name in set(DRAW) - set(arguments.names):
        for suffix in SUFFIXES:
            (arguments.output / f"{name}.{suffix}").unlink(missing_ok=True)
    draw_all(read_tables(arguments.tables), arguments.output, arguments.names)
