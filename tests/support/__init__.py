"""Tests of what can be served, and why the rest cannot."""
