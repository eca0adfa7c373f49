"""The KV cache of a patched model: full stores and rings, row by row."""
