"""A model in vLLM's engine, evaluated as it is served: quantised, or spread over GPUs.

May import `errors`, `store`, `calibration`, `evaluation`.
"""

from vllm_toptheta.engine.subject import EngineSubject

__all__ = ["EngineSubject"]
