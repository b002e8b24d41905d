"""Thresholds for those who write kernels.

In:  the calibrations of the run's criteria, and the levels of its curves.
Out: thresholds.json for each model, criterion and site, which names thresholds.safetensors and
     thresholds.json in the folder of each level. Made by the target `export` only.
"""


rule export_curve:
    input:
        model="results/{model}/model.json",
        calibration="results/{model}/{criterion}/{site}/calibration.safetensors",
        search=ask.curve_search,
    output:
        "results/{model}/{criterion}/{site}/thresholds.json",
    log:
        "results/logs/{model}/{criterion}/{site}/thresholds.log",
    conda:
        "../../envs/atlas.yaml"
    params:
        settings=ask.store_settings,
        criterion=ask.criterion,
        levels=ask.listed_levels,
        code=ask.criterion_code("export"),
    shell:
        """
        python -m sparsity_atlas export \
            --model {input.model} \
            --criterion {params.criterion:q} \
            --site {wildcards.site} \
            --calibration {input.calibration} \
            --levels={params.levels:q} \
            --search={input.search:q} \
            --settings {params.settings:q} \
            --output {output} >{log} 2>&1
        """


rule export:
    input:
        ask.exports(),
    localrule: True
