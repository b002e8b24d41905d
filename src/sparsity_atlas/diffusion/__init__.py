"""Masked diffusion: bounds of likelihoods, and text, by filling in masked tokens. Start with `denoise`."""
