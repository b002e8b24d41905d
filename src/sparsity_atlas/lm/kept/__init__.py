"""Batches that one process arranges for all with the same requests; start at `kept_work`."""
