"""The KV cache of a patched model: full stores, rings and stores that evict, row by row."""
