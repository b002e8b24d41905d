"""Sparsity Atlas: how much of a language model's FFN activations can be dropped before it gets worse."""
