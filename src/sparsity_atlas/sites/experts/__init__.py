"""Routed experts: found through transformers' experts interface, proved by numbers, read and changed.

Start with `implementation`, the forward pass with taps; `discovery` proves that a model's experts compute it.
"""
