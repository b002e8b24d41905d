"""Figures of what is measured beside the curves. Start with `neurons`."""
