"""The experiments that show which modules are an FFN's maps, or an attention's.

Start with `ffn_probe`.
"""
