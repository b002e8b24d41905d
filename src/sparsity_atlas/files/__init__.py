"""Files that are whole or absent: manifests, journals, Parquet and CSV. Start with `whole`."""
