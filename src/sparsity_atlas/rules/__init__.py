"""What the Snakefile asks: files, slices of the configuration, digests, resources. Start with `asks`."""
