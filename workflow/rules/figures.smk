"""Figures and the report.

In:  the tables.
Out: results/figures/*.svg and *.png; results/index.html, one page that needs nothing else, and its
     headline table as headline.csv, and published.csv: ours beside what other papers print.
"""


rule figures:
    input:
        tables=rules.tables.output,
    output:
        svg=figure_files("svg"),
        png=figure_files("png"),
    log:
        "results/logs/figures.log",
    benchmark:
        "results/benchmarks/figures.jsonl"
    conda:
        "../../envs/atlas.yaml"
    params:
        folder=lambda wildcards, output: Path(output[0]).parent,
        names=wanted(ATLAS),
        captions={name: figure.caption for name, figure in FIGURES.items()},
        code=code_version("figures"),
    shell:
        """
        python -m sparsity_atlas figures \
            --tables {input.tables:q} \
            --names {params.names:q} \
            --output {params.folder} >{log} 2>&1
        """


rule page:
    input:
        tables=rules.tables.output,
        svg=rules.figures.output.svg,
        png=rules.figures.output.png,
        config="results/run_config.yaml",
    output:
        page=report("results/index.html", caption="../report/index.rst", category="Report"),
        headline=report("results/headline.csv", caption="../report/headline.rst", category="Report"),
        published="results/published.csv",
    log:
        "results/logs/index.log",
    benchmark:
        "results/benchmarks/index.jsonl"
    conda:
        "../../envs/atlas.yaml"
    params:
        code=code_version("report"),
    shell:
        """
        python -m sparsity_atlas report page \
            --tables {input.tables:q} \
            --figures {input.svg:q} \
            --config {input.config} \
            --output {output.page} \
            --headline {output.headline} \
            --published {output.published} >{log} 2>&1
        """
