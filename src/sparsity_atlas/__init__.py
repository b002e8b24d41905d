"""Sparsity Atlas: how much of a language model's FFN activations can be dropped before it gets worse.

The rooms below lie from the ground up: each imports from those before it alone (`pyproject.toml` has the
order, a test keeps it). `commands` lists what can be run, and where it begins.
"""
