"""The run's tables: every number that a figure shows. Start with `summarize`; `read` reads them back."""
