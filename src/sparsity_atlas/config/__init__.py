"""The configuration, its one schema, and the grid that it asks for. Start with `schema`, then `grid`."""
