"""What the configuration will cost, before anything runs.

In:  the configuration, and whatever stands in results/ already.
Out: a table on the terminal, and results/logs/plan.json, from which a run takes what it expects of its jobs.
"""


rule plan:
    log:
        "results/logs/plan.log",
    localrule: True
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        config=ask.config_text,
        results=RESULTS,
        # On a cluster --jobs limits what runs at once, not the cores of this machine.
        jobs=lambda wildcards: workflow.cores if workflow.local_exec else workflow.nodes,
    shell:
        """
        python -m sparsity_atlas plan \
            --config {params.config:q} \
            --cores {params.jobs} \
            --results {params.results} 2>{log}
        """
