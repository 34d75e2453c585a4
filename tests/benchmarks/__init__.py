"""Tests of the benchmarks: what they compute, not how fast."""
