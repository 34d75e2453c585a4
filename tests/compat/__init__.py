"""Tests against other vLLM versions as well: their Python files, unpacked, without their kernels."""
