"""What is changed in vLLM."""
