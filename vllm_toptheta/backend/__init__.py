"""The vLLM attention backend `toptheta`: the only place that knows vLLM's internals.

May import `errors`, `limits`, `settings`, `store`, `support`, `selection`, `kernels`, `telemetry`.
"""
