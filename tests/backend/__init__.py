"""Tests of the vLLM backend that need no engine."""
