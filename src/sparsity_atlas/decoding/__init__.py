"""One step of decoding that leaves out the weights which zeros meet: linear maps and gated FFNs for a few
tokens.

`maps` is the way in. Nothing here is part of an evaluation, in which zeros are multiplied like any other
number: it shows what they are worth in time, with the same masks.
"""
