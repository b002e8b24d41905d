"""What is drawn of the studies; as light as the catalogue of all figures, which these are a part of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A figure that every run makes, as results/figures/{name}.svg and .png.

    title: its heading.
    category: its heading in Snakemake's report.
    tables: the CSV files that hold every number in it.
    caption: how to read it; plain text, without reStructuredText's special characters.
    missed: whether a report says so where there is nothing to show in it.
    """

    title: str
    category: str
    tables: tuple[str, ...]
    caption: str
    missed: bool = True


# Of models side by side, and of one training's.
OVER_MODELS = {
    "foretelling": Entry(
        "What foretells how much can be dropped",
        "Headline",
        ("foretelling",),
        "Spearman rank correlation over the models, between numbers that need no evaluation and PPL-1% or "
        "critical sparsity, at each site and at all sites of a criterion together. Whiskers are 95 % "
        "intervals by a bootstrap over the models, which are too short where these are few; filled symbols "
        "are resolved: 10 models or more, and an interval on one side of zero.",
        missed=False,
    ),
    "training": Entry(
        "Activation ratio over training tokens",
        "Headline",
        ("training", "training_fits"),
        "Share of entries that are not dropped (1 - sparsity) at each bar, over the tokens that each "
        "checkpoint of a training was trained on, with 95 % intervals by paired bootstrap. Lines are the law "
        "that Sparsing Law has for the activation, by least squares; where it has no limit and the other law "
        "has one, the other. The band at the headline bar is the wider of a bootstrap over documents and one "
        "over residuals. Below each panel the limit that either law goes to, or why none can be told.",
        missed=False,
    ),
    "training_limits": Entry(
        "Limits of the activation ratio over size",
        "Headline",
        ("training_fits", "training_limits"),
        "The activation ratio that each training goes to by the law of its activation, at the headline bar, "
        "with 95 % intervals, over the parameters outside the embeddings and over width by depth. Grey: what "
        "Sparsing Law prints of its models, of other texts.",
        missed=False,
    ),
}

# Of what criteria keep on the captured text, and of that text alone.
OF_MASKS = {
    "unused_neurons": Entry(
        "Neurons that several tokens leave unused",
        "Neurons",
        ("masks",),
        "Share of neurons that none of t consecutive tokens keeps, on the captured text: what a batch or "
        "speculative decoding of t tokens can still skip. Of all levels the one is shown whose sparsity is "
        "nearest to 50 %. Lines are means over the layers, bands go from the smallest to the largest. "
        "Dashed: what is left if each entry were dropped by itself, the sparsity to the power of t; "
        "dotted: if each neuron were kept by itself, as often as it is.",
    ),
    "mask_reuse": Entry(
        "What tokens keep of the neurons of earlier ones",
        "Neurons",
        ("masks",),
        "Of the neurons that a token keeps, the share that the token so many places before it keeps, too; "
        "mean over the tokens. Lines, bands, levels and what chance would give as in the figure before.",
    ),
    "position_sparsity": Entry(
        "Sparsity over the position in the sequence",
        "Neurons",
        ("masks",),
        "Share of entries that are dropped or zero, by the token's position: a point stands for the "
        "positions from its own up to the next. Lines, bands and levels as in the figures before.",
    ),
    "neuron_frequency": Entry(
        "How often neurons are kept",
        "Neurons",
        ("masks",),
        "Share of the neurons of a layer that at most so many of the tokens keep: where a line begins above "
        "zero, neurons are never on; where it ends below 100 %, neurons are nearly always on. Lines, bands "
        "and levels as in the figures before.",
    ),
    "prompt_overlap": Entry(
        "What later tokens share with a prompt's mask",
        "Neurons",
        ("prompt_reuse",),
        "Of the neurons that a token behind the prompt would choose, as many as the prompt's mask has, the "
        "share that is in that mask, by the distance from the prompt: a point stands for the distances from "
        "its own up to the next. Dashed: in the mask of another sequence's prompt; dotted: in one that is "
        "drawn at random. Lines are means over the layers, bands go from the smallest to the largest. Of "
        "all levels the one is shown that drops nearest to 50 % behind the prompt.",
        missed=False,
    ),
    "prompt_overlap_layers": Entry(
        "What later tokens share with a prompt's mask, by layer",
        "Neurons",
        ("prompt_reuse",),
        "As in the figure before, over all distances, layer by layer; bands are 95 % intervals by bootstrap "
        "over the sequences.",
        missed=False,
    ),
    "prompt_loss": Entry(
        "What a prompt's mask costs behind it",
        "Neurons",
        ("prompt_reuse",),
        "Loss of the tokens behind the prompt above the dense model's, with all layers masked, by the "
        "distance from the prompt: under the prompt's mask, under each token's own of the same size, and "
        "under the mask of another sequence's prompt. Bands are 95 % intervals of the first by paired "
        "bootstrap over the sequences. The prompt is dense. Levels as in the figures before.",
        missed=False,
    ),
    "mask_recall": Entry(
        "What a low-rank predictor foretells of the masks",
        "Neurons",
        ("masks",),
        "Of the neurons that a token keeps, the share that a predictor keeps, too, which sees the FFN's "
        "input alone; over the predictor's rank. Solid: the FFN's own maps cut to their largest singular "
        "values, and the criterion on what comes out. Dashed: a least-squares map onto the mask, fitted on "
        "half of the captured sequences, its size that of the masks there. Both on the other half. Lines, "
        "bands and levels as in the figures before.",
        missed=False,
    ),
    "cett": Entry(
        "What leaving out small neurons costs",
        "Neurons",
        ("masks",),
        "CETT over the share of entries that lie below a threshold, the same in all layers, of the norm of "
        "what a neuron adds: the norm of what is left out over the norm of the FFN's output, mean over "
        "tokens and layers. A point is a threshold. It follows from activations alone, and no criterion.",
        missed=False,
    ),
    "local_dimension": Entry(
        "Local intrinsic dimension by layer",
        "Layers",
        ("metrics",),
        "How many directions the captured activations have around each of them, by the distances to their "
        "neighbours: by maximum likelihood, and extrapolated to no distance (GeoMLE). Effective rank counts "
        "directions of all tokens together.",
        missed=False,
    ),
}
# Of what was timed on some machine.
OF_TIME = {
    "speed": Entry(
        "Measured speed-up of whole tokens",
        "Speed",
        ("speed",),
        "How many times as fast as the dense model a token is decoded where the weights that zeros meet are "
        "not read, over the sparsity of the text, with thresholds found at each token as the criterion does "
        "and with constants that drop as much. Dots: where the curve crosses the headline bar, or ends "
        "above it. Dotted: what it would be if time were weight bytes. Bands: half the distance between the "
        "quartiles of the times on either side. Of the machine that is named.",
        missed=False,
    ),
    "speed_parts": Entry(
        "Measured speed-up of parts' maps",
        "Speed",
        ("speed",),
        "As in the figure before, of the maps of each kind of part by themselves, with cold caches.",
        missed=False,
    ),
    "speed_batch": Entry(
        "Measured speed-up over tokens decoded together",
        "Speed",
        ("speed",),
        "The speed-up over the number of tokens of different sequences that are decoded together: a weight "
        "is read if one of them wants it. Solid and dashed: at 50 and 90 % of zeros; dots: where the curve "
        "crosses the headline bar, or ends above it. Of whole tokens, where these were timed.",
        missed=False,
    ),
}

# Of tasks that have a text put before their prompts.
OF_TEXTS = {
    "inserted": Entry(
        "Texts before the prompts: scores",
        "Tasks",
        ("inserted", "curves"),
        "Score of a task with a text before its prompts less its score without, in the dense model (the "
        "first point) and at each level, over the sparsity that the level induces without the text. Above "
        "zero accuracy, or loss, is higher with it. Bands are 95 % intervals by paired bootstrap over the "
        "documents.",
        missed=False,
    ),
    "inserted_gates": Entry(
        "Texts before the prompts: gates",
        "Tasks",
        ("inserted_gates",),
        "Change of the dense model's gates after the nonlinearity by a text before the prompts, on the same "
        "tokens, as a share of what they are without it: share near zero (the same bound for both), L1 and "
        "L2 norm, and Gini coefficient of the magnitudes, mean over tokens and documents. Bands are 95 % "
        "intervals by paired bootstrap over the documents.",
        missed=False,
    ),
}
