"""What is measured beside the tasks: output errors, and one layer at a time. Start with `output_error`."""
