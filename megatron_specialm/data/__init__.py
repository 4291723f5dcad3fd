"""From documents to batches: readers, tokenizers, the token store, splits, sampling order, teacher caches."""
