"""CUDA kernels on the CPU: the threads of a CTA as fibers, for tests without a GPU."""
