"""Whether a model's own answers are right, and what tells: local dimension, sparsity, confidence.

Start with `own_answers`, which captures the answers; `predictors` compares what tells right ones.
"""
