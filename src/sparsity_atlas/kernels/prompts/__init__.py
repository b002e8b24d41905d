"""Sums over the entries and the tokens of sequences, for masks that follow from a whole prompt. Start with
`sequence_sums`, whose definitions the kernels for CPU and CUDA give bit for bit.
"""
