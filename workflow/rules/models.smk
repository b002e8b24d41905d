"""The run's configuration and the models.

In:  the configuration; models in local folders or on the Hub.
Out: results/run_config.yaml, and a manifest for each model: where it comes from, the digest of its
     weights, its sizes, and the sites that were found in it.
"""


rule run_config:
    output:
        "results/run_config.yaml",
    log:
        "results/logs/run_config.log",
    localrule: True
    conda:
        "../../envs/atlas.yaml"
    params:
        config=ask.config_text,
        code=code_version("run_config"),
    shell:
        """
        python -m sparsity_atlas run_config \
            --config {params.config:q} \
            --output {output} >{log} 2>&1
        """


rule model:
    output:
        "results/{model}/model.json",
    log:
        "results/logs/{model}/model.log",
    benchmark:
        "results/benchmarks/{model}/model.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    # Not in params: a site or a criterion that is added must not make the manifest anew.
    resources:
        sites=ask.requested_sites,
        not_in_experts=ask.not_in_experts,
        mem_mb=ask.memory("models"),
        gpu_mb=ask.gpu_memory("models"),
        runtime=ask.capture_minutes,
    params:
        source=ask.model_source,
        files=ask.model_digest,
        code=code_version("models"),
    shell:
        """
        python -m sparsity_atlas models \
            --name {wildcards.model} \
            --source {params.source:q} \
            --sites {resources.sites:q} \
            --not-in-experts {resources.not_in_experts:q} \
            --output {output} >{log} 2>&1
        """
