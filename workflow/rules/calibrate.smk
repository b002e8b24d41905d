"""What calibrated criteria find in the captured activations.

In:  a model's manifest and the activations of a site.
Out: calibration.safetensors for each model, criterion and site: what every level of it needs.
"""


rule calibrate:
    input:
        model="results/{model}/model.json",
        capture=ask.capture,
    output:
        "results/{model}/{criterion}/{site}/calibration.safetensors",
    log:
        "results/logs/{model}/{criterion}/{site}/calibration.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/calibration.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    resources:
        gpu=ask.gpus,
        mem_mb=ask.memory("calibrate"),
        gpu_mb=ask.gpu_memory("calibrate"),
        runtime=ask.calibration_minutes,
    params:
        settings=ask.store_settings,
        criterion=ask.criterion,
        model=subpath(input.capture, ancestor=2),
        code=ask.criterion_code("calibrate"),
    shell:
        """
        python -m sparsity_atlas calibrate \
            --model {input.model} \
            --capture {input.capture} \
            --store {params.model}/activations.zarr \
            --criterion {params.criterion:q} \
            --site {wildcards.site} \
            --settings {params.settings:q} \
            --code {params.code} \
            --output {output} >{log} 2>&1
        """
