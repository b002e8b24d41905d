"""The embedded models and what they are judged on: training recipe, minimal pairs, cloze items.

Start with `recipe`, then `train`; `pairs` and `cloze` write the tasks.
"""
