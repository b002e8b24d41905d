"""Prompts and answers beside a node's samples, where they are asked for; start with `text_table`."""
