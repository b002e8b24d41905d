"""Sparsity Atlas: how much of a language model's FFN activations can be dropped.

snakemake --cores all                                    everything that config.yaml asks for
snakemake --cores all results/<model>/summary.csv        one model
snakemake --cores all results/<model>/<criterion>/<site>/<level>/eval.json      one node
snakemake --cores all plan                               what it will cost, before it runs
snakemake --cores all export                             the thresholds of calibrated criteria, for kernels
snakemake --cores 1 clean                                what is left of runs, and needed by nothing
"""

from snakemake.utils import min_version

min_version("9.20")


configfile: f"{workflow.current_basedir}/config.yaml"


report: "workflow/report/workflow.rst"


# In the order of a run.
include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/capture.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/metrics.smk"
include: "workflow/rules/sensitivity.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/truthfulness.smk"
include: "workflow/rules/summarize.smk"
include: "workflow/rules/speed.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/clean.smk"


onerror:
    # A report of what there is, with what failed and why.
    shell(
        "python -m sparsity_atlas report partial --results results --config {text:q} >&2",
        text=ask.config_text(),
    )


rule all:
    default_target: True
    input:
        "results/run_config.yaml",
        "results/critical_sparsity.csv",
        "results/curves.csv",
        "results/index.html",
        "results/headline.csv",
        ask.model_files("summary.csv"),
        ask.listed_nodes(),
        ask.lost_nodes(),
    localrule: True
