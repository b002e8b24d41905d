"""The levels of a curve, chosen one after the other: each follows from what those before it showed.

In:  a model's manifest and its dense baseline; tasks, criterion and site from the configuration.
Out: search.json, with the nodes of the levels beside it.
"""


rule search:
    input:
        model="results/{model}/model.json",
        dense="results/{model}/dense/eval.json",
        calibration=ask.calibration,
    output:
        "results/{model}/{criterion}/{site}/search.json",
    log:
        "results/logs/{model}/{criterion}/{site}/search.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/search.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    resources:
        gpu=ask.gpus,
        mem_mb=ask.memory("search"),
        gpu_mb=ask.gpu_memory("search"),
        runtime=ask.search_minutes,
    params:
        settings=ask.node_settings,
        search=ask.search_settings,
        criterion=ask.criterion,
        tasks=ask.node_tasks,
        code=ask.criterion_code("evaluate"),
        search_code=code_version("search"),
    shell:
        """
        python -m sparsity_atlas search \
            --model {input.model} \
            --dense {input.dense} \
            --settings {params.settings:q} \
            --search {params.search:q} \
            --code {params.code} \
            --criterion {params.criterion:q} \
            --site {wildcards.site} \
            --calibration={input.calibration:q} \
            --output {output} >{log} 2>&1
        """
