"""The tasks, with and without a criterion.

In:  a model's manifest; tasks, criterion, site and level from the configuration.
Out: eval.json of the dense baseline and of every listed node. Samples and journals lie beside it and
     are no outputs: a killed job goes on with them.
"""


rule dense:
    input:
        model="results/{model}/model.json",
    output:
        "results/{model}/dense/eval.json",
    log:
        "results/logs/{model}/dense/eval.log",
    benchmark:
        "results/benchmarks/{model}/dense/eval.jsonl"
    # Before listed nodes: it knows whether each document has its metric.
    priority: 1
    conda:
        "../../envs/atlas.yaml"
    threads: ask.dense_threads
    resources:
        gpu=ask.gpus,
        mem_mb=ask.dense_memory,
        gpu_mb=ask.gpu_memory("dense"),
        runtime=ask.node_minutes,
    params:
        settings=ask.dense_settings,
        metrics=ask.dense_metrics,
        tasks=ask.dense_tasks,
        code=code_version("evaluate"),
    shell:
        """
        python -m sparsity_atlas evaluate \
            --model {input.model} \
            --settings {params.settings:q} \
            --metrics {params.metrics:q} \
            --code {params.code} \
            --output {output} >{log} 2>&1
        """


rule evaluate:
    input:
        model="results/{model}/model.json",
        search=ancient(ask.search_of_node),
        calibration=ask.calibration,
    output:
        "results/{model}/{criterion}/{site}/{level}/eval.json",
    log:
        "results/logs/{model}/{criterion}/{site}/{level}/eval.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/{level}/eval.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    # Metrics not in params: a node refuses those that there are not, and another one makes it no other.
    resources:
        metrics=ask.node_metrics,
        gpu=ask.gpus,
        mem_mb=ask.memory("evaluate"),
        gpu_mb=ask.gpu_memory("evaluate"),
        runtime=ask.node_minutes,
    params:
        settings=ask.node_settings,
        criterion=ask.criterion,
        tasks=ask.node_tasks,
        code=ask.criterion_code("evaluate"),
    shell:
        """
        python -m sparsity_atlas node \
            --model {input.model} \
            --settings {params.settings:q} \
            --metrics {resources.metrics:q} \
            --code {params.code} \
            --criterion {params.criterion:q} \
            --site {wildcards.site} \
            --level {wildcards.level} \
            --calibration={input.calibration:q} \
            --output {output} >{log} 2>&1
        """
