"""From a call of a patched model to its kernels, and the cache between calls."""
