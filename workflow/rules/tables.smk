"""The run's tables.

In:  what the stages before found of each curve, model and study.
Out: the CSV files of the run.
"""


rule tables:
    input:
        models=ask.model_files("model.json"),
        curves=ask.curve_files("curve.json"),
        equal=ask.curve_files("equal_sparsity.parquet"),
        sparsity=ask.curve_files("sparsity.parquet"),
        masks=ask.curve_files("masks.parquet"),
        reuse=ask.curve_files("prompt_reuse.parquet"),
        metrics=ask.metric_files(),
        sensitivity=ask.sensitivity_files(),
        truthfulness=ask.truthfulness_files(),
        speed=ask.timing_files(),
    output:
        critical=report("results/critical_sparsity.csv", category="Tables"),
        curves=report("results/curves.csv", category="Tables"),
        comparison=report("results/comparison.csv", category="Tables"),
        twins=report("results/twins.csv", category="Tables"),
        layers="results/layers.csv",
        layer_profile="results/layer_profile.csv",
        metrics="results/metrics.csv",
        magnitudes="results/magnitudes.csv",
        output_error="results/output_error.csv",
        masks="results/masks.csv",
        prompt_reuse="results/prompt_reuse.csv",
        inserted="results/inserted.csv",
        inserted_gates="results/inserted_gates.csv",
        allocation="results/allocation.csv",
        sensitivity="results/sensitivity.csv",
        experts="results/experts.csv",
        steps="results/steps.csv",
        scaling="results/scaling.csv",
        foretelling="results/foretelling.csv",
        training="results/training.csv",
        training_fits="results/training_fits.csv",
        training_limits="results/training_limits.csv",
        truthfulness="results/truthfulness.csv",
        speed="results/speed.csv",
        models="results/models.csv",
        failures="results/failures.csv",
    log:
        "results/logs/tables.log",
    benchmark:
        "results/benchmarks/tables.jsonl"
    conda:
        "../../envs/atlas.yaml"
    params:
        # The input files by what they have in common: their names would exceed a command line.
        curves=ask.selection,
        studies=ask.studies,
        pairs=ask.pairs,
        checkpoints=ask.checkpoints,
        truthfulness=ask.truthfulness,
        speed=ask.timed_curves,
        results=subpath(output.critical, parent=True),
        code=code_version("summarize"),
    shell:
        """
        python -m sparsity_atlas summarize tables \
            --curves {params.curves:q} \
            --studies {params.studies:q} \
            --pairs {params.pairs:q} \
            --checkpoints {params.checkpoints:q} \
            --truthfulness {params.truthfulness:q} \
            --speed {params.speed:q} \
            --results {params.results} >{log} 2>&1
        """
