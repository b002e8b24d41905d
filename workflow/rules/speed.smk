"""What the zeros gain in time on this machine.

In:  a model's manifest, a curve with its criterion's calibration, and the text of the site's capture.
Out: speed.parquet for each model, criterion and site of a run block with `speed`. Times are those of the
     machine that the job ran on, and no two runs give the same.
"""


rule speed:
    input:
        model="results/{model}/model.json",
        capture=ask.capture,
        curve="results/{model}/{criterion}/{site}/curve.json",
        calibration=ask.calibration,
    output:
        "results/{model}/{criterion}/{site}/speed.parquet",
    log:
        "results/logs/{model}/{criterion}/{site}/speed.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/speed.jsonl"
    conda:
        "../../envs/atlas.yaml"
    # All of them, so that nothing else runs meanwhile; of two such jobs on a machine one waits for the other.
    threads: ask.timing_threads
    resources:
        gpu=ask.timing_gpus,
        mem_mb=ask.memory("speed"),
        gpu_mb=ask.gpu_memory("speed"),
        runtime=ask.timing_minutes,
    params:
        settings=ask.timing_settings,
        criterion=ask.criterion,
        model=subpath(input.capture, ancestor=2),
        code=ask.criterion_code("speed"),
    shell:
        """
        python -m sparsity_atlas speed \
            --model {input.model} \
            --site {wildcards.site} \
            --store {params.model}/activations.zarr \
            --criterion {params.criterion:q} \
            --calibration={input.calibration:q} \
            --curve {input.curve} \
            --settings {params.settings:q} \
            --output {output} >{log} 2>&1
        """
