"""What the rules know of the configuration.

The answers are in src/sparsity_atlas/rules/asks.py (which files, or which slice of the configuration) and resources.py.

Path grammar, below results/:
    {model}/model.json                              the model's manifest
    {model}/capture/{site}.json                     its activations (in activations.zarr)
    {model}/metrics/{site}.parquet                  what they look like
    {model}/dense/eval.json                         the untouched model on all its tasks
    {model}/{criterion}/{site}/{level}/eval.json    a node
    {model}/{criterion}/{site}/calibration.safetensors      what a calibrated criterion found there
    {model}/{criterion}/{site}/thresholds.json      the thresholds of each level, for those who write kernels
    {model}/{criterion}/{site}/search.json          the levels that `levels: auto` chose
    {model}/{criterion}/{site}/sparsity.parquet     induced sparsity and output error, all levels
    {model}/{criterion}/{site}/masks.parquet        how masks of neighbouring tokens go together
    {model}/{criterion}/{site}/prompt_reuse.parquet what a prompt's mask is worth behind it
    {model}/{criterion}/{site}/sensitivity.parquet  what one layer at a time adds to the loss
    {model}/{criterion}/{site}/curve.json           what later stages need of the nodes
    {model}/{criterion}/{site}/speed.parquet        what the zeros gain in time on this machine, if asked for
    {model}/{criterion}/{site}/equal_sparsity.parquet       scores at fixed sparsities, to compare criteria
    {model}/answers/{task}.json                     a model's own answers (last tokens in {task}.zarr)
    {model}/truthfulness/{task}.parquet             what tells right answers from wrong ones
    {model}/summary.csv                             one model's numbers
With a criterion before it, {site} may be confined to parts of the layers, and to some layers, and give each
map that reads a vector a mask of its own: intermediate@experts, input@layers0-3+7, all_linear_inputs@projections.
"""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

# Not workflow.basedir, nor plain "results": another workflow may use this one as a module, with a prefix.
HERE = workflow.current_basedir
RESULTS = str(workflow.modifier.modify_path("results"))

# None where Snakemake fetches the rules file by file, as for `snakefile: github(...)`.
ROOT = Path(HERE).parents[1] if isinstance(HERE, os.PathLike) else None

if ROOT:
    # This checkout's own code, in this process and in the jobs', also where it is not installed.
    SOURCE = str(ROOT / "src")
    sys.path.insert(0, SOURCE)
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
    )
elif find_spec("sparsity_atlas") is None:
    raise SystemExit(f"error: rules of {HERE} need the package of the same release: pip install it")

from snakemake_logger_plugin_atlas import expect
from sparsity_atlas.plan.expected_seconds import at_once, expected
from sparsity_atlas.rules.asks import Asks
from sparsity_atlas.code_version import code_version
from sparsity_atlas.config.schema import parse as parse_config
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.figures.wanted import wanted
from sparsity_atlas.rules.inputs import check_inputs, locate
from sparsity_atlas.terms import SITES, SPELLED, SPELLED_LAYERS

# For the target `clean` alone (`--config remove=true`), and no part of what is measured.
REMOVE = config.pop("remove", False)

try:
    ATLAS = parse_config(locate(config, ROOT) if ROOT else config)
    check_inputs(ATLAS)
    ask = Asks(ATLAS, RESULTS)
    # For the time that is left, which the logger says; of an outer workflow's own jobs it knows nothing.
    cores = lambda: workflow.cores if workflow.local_exec else workflow.nodes
    expect(lambda: (expected(ATLAS, Path(RESULTS)), at_once(ATLAS, cores() or 1)))
except AtlasError as error:
    # Snakemake would add to any other exception where in this file it was raised.
    raise SystemExit(f"error: {error}") from None


wildcard_constraints:
    model="|".join(map(re.escape, ATLAS.models)),
    criterion="|".join(map(re.escape, ATLAS.criteria)),
    site=f"(?:{'|'.join(map(re.escape, SPELLED))})(?:{SPELLED_LAYERS})?",
    task="|".join(map(re.escape, ATLAS.tasks)),
    level=r"0|[1-9]\d*|\d+\.\d*[1-9]",


def figure_files(suffix):
    """The figures of a run in one format, with their places in Snakemake's own report."""
    files = []
    for name, figure in ((name, FIGURES[name]) for name in wanted(ATLAS)):
        labels = {"figure": figure.title, "format": suffix.upper()}
        place = dict(caption=f"../report/{name}.rst", category=figure.category, labels=labels)
        files += [report(f"results/figures/{name}.{suffix}", **place)]
    return files
