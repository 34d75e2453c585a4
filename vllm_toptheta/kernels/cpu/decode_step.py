"""Top-Theta attention of one new token per sequence over the paged KV cache, on CPUs: what a layer asks for."""

from __future__ import annotations

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall, check
from vllm_toptheta.kernels.cpu import shadow, tiers, values
from vllm_toptheta.kernels.cpu.scratch import CpuScratch


def decode(step: DecodeStep, call: LayerCall, scratch: CpuScratch) -> None:
    """One new token per sequence, by shadow keys or copies where the layer has them.

    Args:
        step: The step, prepared (`batch.prepare_decode`).
        call: A layer's; without thresholds it keeps every key.
        scratch: Of the layer.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    check(step, call)
    if values.is_dense(step, call.layer):
        values.keep_everything(step.prepared, call, scratch)
    elif call.layer.shadow is not None:
        shadow.keep_survivors(step.prepared, call, scratch)
    elif call.layer.tiers is not None:
        tiers.weigh(step.prepared, call, scratch)
    else:
        values.keep_survivors(step.prepared, call, scratch)
