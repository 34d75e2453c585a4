"""Tests against vLLM versions other than the installed one: their Python files, unpacked, without their kernels."""
