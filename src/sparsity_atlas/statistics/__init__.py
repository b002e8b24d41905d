"""Bootstrap, monotone fits, interpolation and slopes, of any numbers. Start with `bootstrap`."""
