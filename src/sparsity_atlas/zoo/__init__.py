"""The embedded models and what they are judged on: training recipe, minimal pairs, cloze items."""
