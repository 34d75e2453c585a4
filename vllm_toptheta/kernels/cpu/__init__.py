"""Kernels for CPUs: compiled by Numba where that is worth it, vectorised torch operations elsewhere."""
