"""Curves and their critical sparsities.

In:  the nodes of a curve and its dense baseline.
Out: curve.json and equal_sparsity.parquet (the only stage that reads samples), and a summary for each model.
"""


rule curve:
    input:
        dense="results/{model}/dense/eval.json",
        nodes=ask.curve_nodes,
        search=ask.curve_search,
    output:
        curve="results/{model}/{criterion}/{site}/curve.json",
        equal="results/{model}/{criterion}/{site}/equal_sparsity.parquet",
    log:
        "results/logs/{model}/{criterion}/{site}/curve.log",
    benchmark:
        "results/benchmarks/{model}/{criterion}/{site}/curve.jsonl"
    conda:
        "../../envs/atlas.yaml"
    threads: 1
    params:
        settings=ask.curve_settings,
        levels=ask.listed_levels,
        code=code_version("curve"),
    shell:
        """
        python -m sparsity_atlas curve \
            --dense {input.dense} \
            --levels={params.levels:q} \
            --search={input.search:q} \
            --site {wildcards.site} \
            --settings {params.settings:q} \
            --output {output.curve} \
            --equal {output.equal} >{log} 2>&1
        """


rule model_summary:
    input:
        model="results/{model}/model.json",
        curves=ask.model_curves,
        sparsity=ask.model_sparsity,
        metrics=ask.model_metrics,
    output:
        "results/{model}/summary.csv",
    log:
        "results/logs/{model}/summary.log",
    localrule: True
    conda:
        "../../envs/atlas.yaml"
    params:
        code=code_version("summarize"),
    shell:
        """
        python -m sparsity_atlas summarize model \
            --model {input.model} \
            --curves {input.curves:q} \
            --output {output} >{log} 2>&1
        """
