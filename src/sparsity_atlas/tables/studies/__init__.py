"""Tables of what is measured beside the curves. Start with `profile`."""
