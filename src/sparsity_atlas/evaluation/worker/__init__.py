"""A process that keeps a model loaded, so that nodes that are Snakemake jobs need not load it each.

A job is a client: it finds a worker of its model that is free, or starts one, and sends it the command
line of the stage `evaluate`. The worker streams its log lines back, and ends by itself when nobody
needs it. What a node is computed from is checked for every request, so that a worker never answers
for files that changed since it loaded them. See `client` for when a job does the work itself instead.
"""
