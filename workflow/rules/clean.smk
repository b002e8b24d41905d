"""What runs left that nothing needs any more.

In:  the configuration, and whatever stands in results/.
Out: a list on the terminal; with `--config remove=true` what it lists is removed.
"""


rule clean:
    log:
        "results/logs/clean.log",
    localrule: True
    conda:
        "../../envs/atlas.yaml"
    params:
        config=ask.config_text,
        results=RESULTS,
        flag="--remove" if REMOVE else "",
    shell:
        """
        python -m sparsity_atlas clean \
            --config {params.config:q} \
            --results {params.results} {params.flag} 2>{log}
        """
