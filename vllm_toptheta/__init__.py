"""Top-Theta attention for vLLM: a calibrated threshold per head decides which cached values a decode step reads."""

__version__ = "0.1.0"
