"""A loaded model: proved to be of its kind, measured, described. Start with `manifest`, stage `models`."""
