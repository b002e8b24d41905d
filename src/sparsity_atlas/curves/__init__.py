"""From samples to curves, critical sparsities and scores at equal sparsity. Start with `curve`."""
