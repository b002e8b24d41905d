"""A dense model's gates with and without a text before the prompts. Start with `measured_gates`."""
