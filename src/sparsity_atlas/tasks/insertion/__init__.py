"""Texts that are put before a task's prompts: see `opening`."""
