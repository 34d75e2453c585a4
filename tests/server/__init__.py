"""Tests of `toptheta serve` up to the moment in which it becomes `vllm serve`."""
