"""Training for sparsity: other nonlinearities, from a checkpoint, a rising L1 penalty, FATReLU.

Start with `course`; `variants` says which FFNs there are.
"""
