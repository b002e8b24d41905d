"""The model as lm-eval sees it: batches, shared contexts, scores, generation. Start with `model`."""
