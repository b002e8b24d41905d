"""The report: figures, words and tables on one page, and what failed. Start with `report`."""
