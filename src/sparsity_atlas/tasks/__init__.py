"""lm-eval's tasks: loaded, fingerprinted, their requests built once. Start with `load`."""
