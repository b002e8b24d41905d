"""Generation on a GPU: one recorded step for all rows, each of which makes room for a prompt when it ends.

Start with `engine`.
"""
