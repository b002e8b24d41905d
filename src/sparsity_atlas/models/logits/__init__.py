"""A model's logits, made a piece at a time, and what they say of tokens; start with `head`."""
