"""Requests that begin alike, as trees; start at `planting`."""
