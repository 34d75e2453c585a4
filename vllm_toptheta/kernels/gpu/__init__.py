"""Triton kernels for NVIDIA GPUs, and what launches them."""
