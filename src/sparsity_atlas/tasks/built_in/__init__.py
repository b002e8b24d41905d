"""The tasks that come with lm-eval, without reading fourteen thousand files each time; see `index`."""
