"""Kernels in Triton, one file each, imported where Triton is installed."""
