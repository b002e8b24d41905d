"""A masked-diffusion model as lm-eval sees it: bounds of likelihoods, text by unmasking.

Start with `masked_lm`.
"""
