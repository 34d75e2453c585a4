"""Top-Theta attention for vLLM: a threshold relative to each row decides which cached values a decode step reads."""

__version__ = "0.2.0"
