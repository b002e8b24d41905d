"""What tells right answers of a model's own from wrong ones.

In:  a model's manifest, a task of `studies.truthfulness`, and the nodes that it names.
Out: a manifest of the answers and their samples, and of each model and task how well local intrinsic
     dimension, induced sparsity and confidence tell right ones. The last tokens' vectors are in
     results/{model}/answers/{task}.zarr, which is no output: a killed job goes on with it.
"""


rule answers:
    input:
        model="results/{model}/model.json",
    output:
        answers="results/{model}/answers/{task}.json",
        samples="results/{model}/answers/{task}.parquet",
    log:
        "results/logs/{model}/answers/{task}.log",
    benchmark:
        "results/benchmarks/{model}/answers/{task}.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    resources:
        gpu=ask.gpus,
        mem_mb=ask.memory("answers"),
        gpu_mb=ask.gpu_memory("answers"),
        runtime=ask.node_minutes,
    params:
        settings=ask.answers_settings,
        study=ask.answers_study,
        task=ask.answers_task,
        code=code_version("answers"),
    shell:
        """
        python -m sparsity_atlas answers \
            --model {input.model} \
            --settings {params.settings:q} \
            --study {params.study:q} \
            --code {params.code} \
            --output {output.answers} \
            --samples {output.samples} >{log} 2>&1
        """


rule truthfulness:
    input:
        answers="results/{model}/answers/{task}.json",
        samples="results/{model}/answers/{task}.parquet",
        nodes=ask.truthfulness_nodes,
    output:
        "results/{model}/truthfulness/{task}.parquet",
    log:
        "results/logs/{model}/truthfulness/{task}.log",
    benchmark:
        "results/benchmarks/{model}/truthfulness/{task}.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        settings=ask.truthfulness_settings,
        code=code_version("truthfulness"),
    shell:
        """
        python -m sparsity_atlas truthfulness \
            --answers {input.answers} \
            --nodes {input.nodes:q} \
            --settings {params.settings:q} \
            --output {output} >{log} 2>&1
        """
