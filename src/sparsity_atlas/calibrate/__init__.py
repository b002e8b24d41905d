"""What criteria find in captured activations, how it is spread over layers, and its export.

Start with `calibrate`, the stage.
"""
