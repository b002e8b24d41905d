"""The activations.

In:  a model's manifest, and the text of `capture` in the configuration.
Out: a manifest for each site. The values are in results/{model}/activations.zarr, which is no output:
     Snakemake would delete it with a job that fails, and a killed capture goes on where it stood.
"""


rule capture:
    input:
        model="results/{model}/model.json",
    output:
        "results/{model}/capture/{site}.json",
    log:
        "results/logs/{model}/capture/{site}.log",
    benchmark:
        "results/benchmarks/{model}/capture/{site}.jsonl"
    wildcard_constraints:
        site="|".join(SITES),
    conda:
        "../../envs/atlas.yaml"
    threads: ask.capture_threads
    # Not in params: a site that is added must not capture its siblings again.
    resources:
        sites=ask.requested_sites,
        gpu=ask.gpus,
        mem_mb=ask.memory("capture"),
        gpu_mb=ask.gpu_memory("capture"),
        runtime=ask.capture_minutes,
    params:
        settings=ask.capture_settings,
        text=ask.capture_text,
        model=subpath(output[0], ancestor=2),
        code=code_version("capture"),
    shell:
        """
        python -m sparsity_atlas capture \
            --model {input.model} \
            --site {wildcards.site} \
            --siblings {resources.sites:q} \
            --settings {params.settings:q} \
            --code {params.code} \
            --store {params.model}/activations.zarr \
            --output {output} >{log} 2>&1
        """
