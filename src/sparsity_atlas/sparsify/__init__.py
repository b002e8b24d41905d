"""Attach a criterion at a site and count what it drops. Start with `attach`."""
