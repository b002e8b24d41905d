"""What a curve's zeros gain in time on this machine: maps of parts, and whole tokens of a model that decodes.

Start with `measure`, the stage; `decoder` is the model that decodes with the products of `decoding` in place
of its own maps.
"""
