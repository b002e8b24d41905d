"""A results folder over time: what is left over, and whether all is as it was written.

Start with `doctor`.
"""
