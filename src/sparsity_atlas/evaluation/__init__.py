"""A node, a search for levels, and the tables of samples that they leave. Start with `evaluate`."""
