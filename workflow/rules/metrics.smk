"""What the store alone tells.

In:  captured activations; for the output error the model's FFNs and the levels of its curves.
Out: metrics of each layer and site; induced sparsity and FFN-output error of each level and layer.
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
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        store="results/{model}/activations.zarr",
        code=code_version("metrics"),
    shell:
        """
        python -m sparsity_atlas.metrics \
            --capture {input.capture} \
            --store {params.store} \
            --output {output} >{log} 2>&1
        """


rule output_error:
    input:
        model="results/{model}/model.json",
        capture="results/{model}/capture/{site}.json",
        search=ask.curve_search,
        calibration=ask.calibration,
    output:
        "results/{model}/{criterion}/{site}/sparsity.parquet",
    log:
        "results/logs/{model}/{criterion}/{site}/sparsity.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/sparsity.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        settings=ask.store_settings,
        criterion=ask.criterion,
        levels=ask.listed_levels,
        store="results/{model}/activations.zarr",
        code=ask.criterion_code("output_error"),
    shell:
        """
        python -m sparsity_atlas.output_error \
            --model {input.model} \
            --site {wildcards.site} \
            --store {params.store} \
            --criterion {params.criterion:q} \
            --levels={params.levels:q} \
            --search={input.search:q} \
            --calibration={input.calibration:q} \
            --settings {params.settings:q} \
            --output {output} >{log} 2>&1
        """
