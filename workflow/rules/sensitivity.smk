"""What single layers cost.

In:  a model's manifest, the token ids of a site's capture, and the calibration of a criterion that has one.
Out: sensitivity.parquet for each model, criterion and site of a run block with `sensitivity`. Beside it a
     journal while the job runs: a killed one goes on where it stood.
"""


rule sensitivity:
    input:
        model="results/{model}/model.json",
        capture=ask.capture,
        calibration=ask.calibration,
    output:
        "results/{model}/{criterion}/{site}/sensitivity.parquet",
    log:
        "results/logs/{model}/{criterion}/{site}/sensitivity.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/sensitivity.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    resources:
        gpu=ask.gpus,
        mem_mb=ask.memory("sensitivity"),
        gpu_mb=ask.gpu_memory("sensitivity"),
        runtime=ask.sensitivity_minutes,
    params:
        settings=ask.sensitivity_settings,
        criterion=ask.criterion,
        levels=ask.sensitivity_levels,
        model=subpath(input.capture, ancestor=2),
        code=ask.criterion_code("sensitivity"),
    shell:
        """
        python -m sparsity_atlas sensitivity \
            --model {input.model} \
            --site {wildcards.site} \
            --store {params.model}/activations.zarr \
            --criterion {params.criterion:q} \
            --levels={params.levels:q} \
            --calibration={input.calibration:q} \
            --settings {params.settings:q} \
            --code {params.code} \
            --output {output} >{log} 2>&1
        """
