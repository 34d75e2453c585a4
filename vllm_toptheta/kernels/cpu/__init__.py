"""Vectorised torch operations for CPUs."""
