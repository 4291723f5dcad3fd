"""From documents to batches: readers, windows, the token store, the importance stream."""
