"""What can be served, and why the rest cannot: asked by `toptheta serve` before vLLM starts, and by the backend when it
has started. Both put what they know into the same records, so that they give the same answer. Nothing of vLLM.

model       a model, as its config.json says
hybrids     models some of whose layers do not attend
images      models whose images are attended to in another way
connectors  what copies pages out of an engine and into it
speculation what guesses tokens that the served model then verifies
engine      an engine and its device, as flags or vLLM's configuration say
installed   what the installed vLLM can do
refusal     the reasons, as one error

May import `errors`, `limits`.
"""

from vllm_toptheta.support.connectors import Connector
from vllm_toptheta.support.engine import Device, Engine, engine_reasons, kernel_reasons
from vllm_toptheta.support.hybrids import hybrid_type
from vllm_toptheta.support.images import image_modalities, image_reason
from vllm_toptheta.support.installed import (
    drafts_on_v2,
    has_nixl,
    has_torchvision,
    serves_text_alone,
    splits_pages,
    wakes_up_whole,
)
from vllm_toptheta.support.model import (
    CHUNKED,
    KV_SHARING,
    MLA,
    NO_GENERATION,
    NOT_THIS_HYBRID,
    checkpoint_cache_dtype,
    mixed_field,
    model_reasons,
    override_reasons,
    sharing_field,
    sinks_field,
    text_config,
)
from vllm_toptheta.support.refusal import Reason, refuse
from vllm_toptheta.support.speculation import Draft

__all__ = [
    "CHUNKED",
    "KV_SHARING",
    "MLA",
    "NO_GENERATION",
    "NOT_THIS_HYBRID",
    "Connector",
    "Device",
    "Draft",
    "Engine",
    "Reason",
    "checkpoint_cache_dtype",
    "drafts_on_v2",
    "engine_reasons",
    "has_nixl",
    "has_torchvision",
    "hybrid_type",
    "image_modalities",
    "image_reason",
    "kernel_reasons",
    "mixed_field",
    "model_reasons",
    "override_reasons",
    "refuse",
    "serves_text_alone",
    "sharing_field",
    "sinks_field",
    "splits_pages",
    "text_config",
    "wakes_up_whole",
]
