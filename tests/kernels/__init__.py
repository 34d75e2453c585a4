"""Tests of the kernels against the reference."""
