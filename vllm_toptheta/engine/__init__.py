"""A model in vLLM's engine, evaluated as it is served: quantised, or spread over GPUs."""

from vllm_toptheta.engine.subject import EngineSubject

__all__ = ["EngineSubject"]
