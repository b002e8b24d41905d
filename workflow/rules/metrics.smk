"""What the store alone tells.

In:  captured activations; for the output error the model's FFNs and the levels of its curves.
Out: metrics of each layer and site; of each level and layer induced sparsity, FFN-output error, and how the
     masks of neighbouring tokens go together; and what prompts' masks are worth, if that is asked for.
"""


rule metrics:
    input:
        capture="results/{model}/capture/{site}.json",
    output:
        "results/{model}/metrics/{site}.parquet",
    log:
        "results/logs/{model}/metrics/{site}.log",
    benchmark:
        "results/benchmarks/{model}/metrics/{site}.jsonl"
    wildcard_constraints:
        site="|".join(SITES),
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        model=subpath(input.capture, ancestor=2),
        points=ask.dimension_points,
        code=code_version("metrics"),
    shell:
        """
        python -m sparsity_atlas metrics \
            --capture {input.capture} \
            --store {params.model}/activations.zarr \
            --points {params.points} \
            --output {output} >{log} 2>&1
        """


rule output_error:
    input:
        model="results/{model}/model.json",
        capture=ask.capture,
        search=ask.curve_search,
        calibration=ask.calibration,
    output:
        sparsity="results/{model}/{criterion}/{site}/sparsity.parquet",
        masks="results/{model}/{criterion}/{site}/masks.parquet",
        reuse="results/{model}/{criterion}/{site}/prompt_reuse.parquet",
    log:
        "results/logs/{model}/{criterion}/{site}/sparsity.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/sparsity.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    resources:
        gpu=ask.gpus,
        mem_mb=ask.memory("output_error"),
        gpu_mb=ask.gpu_memory("output_error"),
        runtime=ask.error_minutes,
    params:
        settings=ask.error_settings,
        criterion=ask.criterion,
        levels=ask.listed_levels,
        model=subpath(input.capture, ancestor=2),
        code=ask.criterion_code("output_error"),
    shell:
        """
        python -m sparsity_atlas output_error \
            --model {input.model} \
            --site {wildcards.site} \
            --store {params.model}/activations.zarr \
            --criterion {params.criterion:q} \
            --levels={params.levels:q} \
            --search={input.search:q} \
            --calibration={input.calibration:q} \
            --settings {params.settings:q} \
            --output {output.sparsity} \
            --masks {output.masks} \
            --reuse {output.reuse} >{log} 2>&1
        """
