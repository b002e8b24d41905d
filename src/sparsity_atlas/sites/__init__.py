"""What a decoder's layers hold, proved by experiment, and how its tensors are read and changed.

Start with `part`, which says what they have in common, and `find`.
`hooks` is what the rest of the package uses.
"""
