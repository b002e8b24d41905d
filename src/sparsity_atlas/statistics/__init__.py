"""Bootstrap, monotone fits and slopes, of any numbers. Start with `bootstrap`."""
