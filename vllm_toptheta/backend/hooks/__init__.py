"""What is changed in vLLM where it has no public way: one file per change, each with the reason."""
