"""The one command's table: each stage and tool, the module that does it, and a line on what it does.

`sparsity-atlas NAME ...` and `python -m sparsity_atlas NAME ...` read it, and so does whoever asks for the
code version of a stage. Modules are named, not imported: a stage pays for its own imports alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """What a command runs.

    Attributes:
        module: of this package, with a function `main` that reads `sys.argv`.
        about: what it does.
    """

    module: str
    about: str


# Stages in the order of a run: what the rules call.
STAGES = {
    "run_config": Command(
        "config.record", "write down the configuration and the versions of a run"
    ),
    "models": Command(
        "models.manifest", "resolve a model, prove where its sites are, write its manifest"
    ),
    "capture": Command(
        "activations.capture", "run a text through a model and store its activations"
    ),
    "calibrate": Command(
        "calibrate.calibrate", "find what a calibrated criterion needs to know of a model"
    ),
    "metrics": Command("activations.metrics", "look at a site's activations, layer by layer"),
    "output_error": Command(
        "studies.output_error", "induced sparsity and output error at every level"
    ),
    "sensitivity": Command("studies.sensitivity", "sparsify one layer at a time"),
    "evaluate": Command("evaluation.evaluate", "evaluate one node, or the dense baseline"),
    "node": Command(
        "evaluation.worker.job", "evaluate one node in a process that keeps its model loaded"
    ),
    "search": Command("evaluation.search", "find the levels around the headline bar"),
    "curve": Command(
        "curves.curve", "read a curve's scores and critical sparsities from its samples"
    ),
    "speed": Command("speed.measure", "time on this machine what a curve's zeros gain in decoding"),
    "answers": Command(
        "truthfulness.own_answers", "capture the last tokens of a model's own answers to a task"
    ),
    "truthfulness": Command(
        "truthfulness.predictors", "compare what tells right answers from wrong ones"
    ),
    "summarize": Command("tables.summarize", "write the tables"),
    "figures": Command("figures.draw", "draw the figures"),
    "report": Command("report.report", "write the report"),
}
TOOLS = {
    "plan": Command("plan.cost", "say what a run will cost, before it starts"),
    "export": Command("calibrate.export", "write a calibrated criterion's thresholds for kernels"),
    "compare": Command("report.compare", "set two results folders side by side"),
    "doctor": Command("upkeep.doctor", "compare every file of a results folder with its manifest"),
    "clean": Command("upkeep.clean", "list or remove what runs left over"),
    "harness": Command(
        "evaluation.harness", "lm-eval's own command, with the model `sparsity-atlas`"
    ),
    "schema": Command(
        "config.documents", "write the configuration's schema, for editors and for people"
    ),
    "zoo train": Command("zoo.train", "train the embedded models"),
    "zoo pairs": Command("zoo.pairs", "write the task of minimal pairs"),
    "zoo cloze": Command("zoo.cloze", "write the cloze task"),
}
COMMANDS = {**STAGES, **TOOLS}
