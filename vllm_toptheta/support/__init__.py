"""What can be served, and why the rest cannot: asked by `toptheta serve` before vLLM starts, and by the backend when it
has started. Both put what they know into the same records, so that they give the same answer. Nothing of vLLM.

model    a model, as its config.json says
engine   an engine and its device, as flags or vLLM's configuration say
sleep    what the installed vLLM gives back
refusal  the reasons, as one error
"""

from vllm_toptheta.support.engine import Device, Engine, engine_reasons, kernel_reasons
from vllm_toptheta.support.model import (
    CHUNKED,
    MLA,
    NO_GENERATION,
    checkpoint_cache_dtype,
    model_reasons,
    override_reasons,
    text_config,
)
from vllm_toptheta.support.refusal import Reason, refuse
from vllm_toptheta.support.sleep import wakes_up_whole

__all__ = [
    "CHUNKED",
    "MLA",
    "NO_GENERATION",
    "Device",
    "Engine",
    "Reason",
    "checkpoint_cache_dtype",
    "engine_reasons",
    "kernel_reasons",
    "model_reasons",
    "override_reasons",
    "refuse",
    "text_config",
    "wakes_up_whole",
]
