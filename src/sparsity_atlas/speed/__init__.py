"""A loaded model that decodes with the products of `decoding` in place of its own maps: whole tokens in time.

Start with `decoder`.
"""
