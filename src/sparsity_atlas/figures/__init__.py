"""Figures: the run's tables in, figures out. Nothing here knows of models or of Snakemake.

This is the catalogue of what is drawn, light enough for every start of Snakemake to import;
start with `draw`, which holds the functions.
"""

from __future__ import annotations

from sparsity_atlas.figures.studies.catalogue import OF_MASKS, OF_TEXTS, OF_TIME, OVER_MODELS, Entry

__all__ = ["FIGURES", "Entry"]


_LINES = (
    "Points are measured and lines are the monotone fit; bands are 95 % intervals of the points "
    "by paired bootstrap. "
)

FIGURES = {
    "ppl_sparsity": Entry(
        "PPL-1% sparsity by site and model",
        "Headline",
        ("critical_sparsity",),
        "The largest induced sparsity at which perplexity (of a masked-diffusion model its bound) rises by "
        "no more than 1 %, with its 95 % interval by paired bootstrap. The grey tick is the largest measured "
        "sparsity above the bar, without a fit. A caret at an interval's end: it goes on beyond what was "
        "measured. Open symbols: not resolved, too few or too uncertain texts to tell a bar of 1 %.",
    ),
    "critical_sparsity": Entry(
        "Critical sparsity by site and model",
        "Headline",
        ("critical_sparsity",),
        "The largest induced sparsity that keeps 99 % of dense accuracy, averaged over the accuracy "
        "tasks, with its 95 % interval by paired bootstrap. The grey tick is the largest measured "
        "sparsity above the bar, without a fit. Open symbols: not resolved, too few or too uncertain "
        "items to tell a bar of 1 %. No interval: fewer than 10 independent units.",
    ),
    "scaling": Entry(
        "Sparsity and model size",
        "Headline",
        ("critical_sparsity", "scaling", "models"),
        "PPL-1% and critical sparsity over the parameters outside the embeddings, for each criterion "
        "and family (architecture and activation) with two models or more. A line is drawn only "
        "where the 95 % interval of its slope lies on one side of zero; that interval is the wider "
        "of the one propagated from the points and Student's t on their scatter.",
    ),
    **OVER_MODELS,
    **OF_TIME,
    "added_loss": Entry(
        "Added loss",
        "Curves",
        ("curves",),
        "Loss above the dense model's over induced sparsity, for each site; of a masked-diffusion model "
        "the bound of its loss. "
        + _LINES
        + "The axis is linear up to the bar of PPL + 1 % and logarithmic above it. A cross on the "
        "upper edge is a level that failed numerically.",
    ),
    "retained_accuracy": Entry(
        "Retained accuracy",
        "Curves",
        ("curves",),
        "Accuracy as a share of the dense model's, averaged over the accuracy tasks, for each site. "
        + _LINES
        + "The axis ends at 80 and 110 %; open triangles on the edges are levels beyond them.",
    ),
    "criteria": Entry(
        "Criteria at equal sparsity",
        "Curves",
        ("curves",),
        "The same site of the same model under different criteria, over the sparsity that each of "
        "them induced. " + _LINES,
    ),
    "comparison": Entry(
        "Differences at equal sparsity",
        "Curves",
        ("comparison",),
        "Each criterion's score minus that of the first criterion at the same site of the same model, "
        "both read between their levels at the same induced sparsity of entries. Below zero a criterion "
        "adds less loss than the reference. Where each map has a mask of its own, another panel has each "
        "criterion minus itself with one mask for all maps, over the sparsity of the parameters. Bands are "
        "95 % intervals of the difference by paired bootstrap: both curves draw the same samples.",
    ),
    "twins": Entry(
        "Pairs of models",
        "Curves",
        ("twins",),
        "The second model of a pair minus the first. Left: scores at equal induced sparsity, read "
        "between the levels; above zero the second adds more loss, or retains more accuracy. Right: "
        "sparsities at the bar of 99 %, or PPL + 1 %; above zero the second tolerates more. Bands and "
        "whiskers are 95 % intervals by bootstrap, paired where both were asked the same documents; a "
        "caret: it goes on beyond what was measured. A causal and a masked-diffusion model are compared on "
        "the right alone, since a bound is no loss.",
        missed=False,
    ),
    "comparison_error": Entry(
        "FFN-output error at equal sparsity",
        "Curves",
        ("comparison",),
        "Relative error of an FFN's output, mean over tokens and layers of the captured text that no "
        "criterion was calibrated on, over the sparsity that each criterion induced there.",
    ),
    "tasks": Entry(
        "Task by task",
        "Tasks",
        ("critical_sparsity",),
        "Critical sparsity (99 % of dense accuracy) of each task and on average, and PPL-1% sparsity "
        "of tasks with a loss; where there are few tasks, 95 % intervals stand below the values.",
    ),
    **OF_TEXTS,
    "layer_sparsity": Entry(
        "Induced sparsity by layer",
        "Layers",
        ("layers",),
        "Share of zeros in each layer at each level, counted while the tasks ran, averaged over "
        "tasks. Levels stand in the order of the sparsity that they induce.",
    ),
    "layer_profile": Entry(
        "Layers under one threshold",
        "Layers",
        ("layer_profile",),
        "Induced sparsity of each layer under several criteria, each read between its levels where all "
        "layers together drop as much on the average. A threshold for the whole model leaves it to the "
        "layers; others ask the same of each, or go by what each layer loses.",
        missed=False,
    ),
    "phase_sparsity": Entry(
        "Prompt and generation by layer",
        "Layers",
        ("layers",),
        "Induced sparsity of each layer in each phase of the tasks: of given text that is scored, of "
        "prompts, and of what is generated after them or denoised. A phase is averaged over the tasks "
        "that have it. Each line is one level; of many, four from mild to harsh.",
        missed=False,
    ),
    "expert_sparsity": Entry(
        "Sparsity of experts by layer",
        "Layers",
        ("experts", "layers"),
        "Induced sparsity of each expert of a mixture on the tokens that were routed to it, mean over "
        "tasks: a box is the middle half of a layer's experts with their median, and its whiskers go to "
        "the smallest and the largest. Lines are layers of dense models under the same criterion at the "
        "same level. Of all levels (of those that a dense model has, too, if there are such) the one is "
        "shown at which the experts' mean sparsity is nearest to 50 %.",
        missed=False,
    ),
    "expert_load": Entry(
        "Sparsity and load of experts",
        "Layers",
        ("experts",),
        "Induced sparsity of each expert of a mixture over its load, the share of tokens that were routed "
        "to it, both mean over tasks, at the same levels as in the figure before. Experts that no "
        "token reached are not shown.",
        missed=False,
    ),
    "step_sparsity": Entry(
        "Sparsity over denoising steps",
        "Denoising",
        ("steps",),
        "Induced sparsity of a masked-diffusion model while it generates: in its prompts, and in the tokens "
        "of its answers that are still masked, were filled in by the step before, or earlier. Lines are "
        "means over the layers, bands go from the smallest to the largest. Of all levels the one is "
        "shown at which the answers' sparsity is nearest to 50 %.",
        missed=False,
    ),
    "step_overlap": Entry(
        "Overlap of masks over denoising steps",
        "Denoising",
        ("steps",),
        "Jaccard overlap of the masks of all tokens of a region with those of the same tokens in the step "
        "before and in step 0: entries that both keep, of those that one of them keeps. Lines are means "
        "over the layers, bands go from the smallest to the largest. Levels as in the figure before.",
        missed=False,
    ),
    "step_layers": Entry(
        "Overlap of masks with step 0 by layer",
        "Denoising",
        ("steps",),
        "Jaccard overlap of the masks of the answers' tokens with those of the same tokens in step 0, layer "
        "by layer. Levels as in the two figures before.",
        missed=False,
    ),
    "single_layers": Entry(
        "Scores with one layer sparsified",
        "Layers",
        ("curves",),
        "The loss above the dense model's, or accuracy as a share of it, on the run's tasks if one layer "
        "alone is sparsified: of run blocks whose layers name them one by one. A line a level, with bands "
        "that are 95 % intervals by paired bootstrap. Sensitivity shows the same of the captured text.",
    ),
    "sensitivity": Entry(
        "Sensitivity of single layers",
        "Layers",
        ("sensitivity",),
        "What one layer adds to the loss if it alone is sparsified, at each level of the criterion, over "
        "the captured text. On a logarithmic scale.",
    ),
    "allocation_damage": Entry(
        "What an allocation goes by",
        "Layers",
        ("allocation",),
        "What one layer costs if it alone is sparsified, over the sparsity that it has then: added loss "
        "on the calibration text for criteria with the allocation sensitivity, relative FFN-output error "
        "for the others. On a logarithmic scale.",
    ),
    "allocation": Entry(
        "Allocation over layers",
        "Layers",
        ("allocation",),
        "Sparsity that each layer has at a target for all of them, for criteria whose allocation is not "
        "uniform.",
    ),
    "output_error": Entry(
        "FFN-output error",
        "Layers",
        ("output_error",),
        "Relative error of an FFN's output, the norm of the difference over the norm of the dense "
        "output, as a mean over tokens and layers of the captured text; bands span the layers. Each "
        "layer has its dense input, so that errors do not add up over depth.",
    ),
    **OF_MASKS,
    "truthfulness": Entry(
        "What tells right answers from wrong ones",
        "Tasks",
        ("truthfulness",),
        "AUROC of the answers of a model's own: the chance that a right one has the lower local intrinsic "
        "dimension of its last token's vector, the larger confidence, or the larger induced sparsity, than a "
        "wrong one; 50 % is chance. Lines are the layers, with 95 % intervals by bootstrap over the "
        "samples. Right of them, with whiskers: the layer picked on one half of the samples and judged on "
        "the other, the model's confidence, and the sparsity under the nodes that were named.",
        missed=False,
    ),
    "effective_rank": Entry(
        "Effective rank by layer",
        "Layers",
        ("metrics",),
        "Exponential of the entropy of the singular values of the captured activations (tokens by "
        "width), as a share of the width. What the site up holds is linear in the input, so that its "
        "rank cannot exceed the hidden size.",
    ),
    "magnitudes": Entry(
        "Magnitudes by site",
        "Layers",
        ("magnitudes",),
        "How the entries' magnitudes are distributed, relative to the root mean square of their "
        "layer, all layers together. A peak far to the left is mass that can be dropped cheaply.",
    ),
}
