"""What a task's own Python code reaches, found without running it. Start with `follow`."""
