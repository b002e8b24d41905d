"""A checkpoint on this machine: fetched, loaded, described. Start with `manifest`, the stage `models`."""
