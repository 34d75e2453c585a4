"""Tests that start a vLLM engine or server on the CPU, with the demo model or a random one."""
