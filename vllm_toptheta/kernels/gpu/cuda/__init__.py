"""Kernels in CUDA C++, compiled where they run, and what compiles and launches them."""
