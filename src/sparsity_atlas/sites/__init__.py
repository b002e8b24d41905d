"""Where a decoder's maps are, proved by experiment, and how their tensors are read and changed.

Start with `find`; `hooks` is what the rest of the package uses.
"""
