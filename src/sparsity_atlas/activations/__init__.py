"""Captured, stored, looked at. Start with `capture`; `store` is the format."""
