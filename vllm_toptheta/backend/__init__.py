"""The vLLM attention backend `toptheta`: the only place that knows vLLM's internals."""
