"""Top-Theta attention of one new token per sequence that reads most keys as shadows, on the GPU: mode `shadow`.

It answers what `values.decode` does, but for two things: a key can be missed whose shadow scores more than the margin
below its own score, and the softmax denominator knows keys that were not read by their number instead of their scores.
"""

from __future__ import annotations

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall
from vllm_toptheta.kernels.gpu.codes import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.merge import launch_merge
from vllm_toptheta.kernels.gpu.records import Lists, Shadow
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch
from vllm_toptheta.kernels.gpu.shadow_step import ShadowStep, launch_queries, launch_split
from vllm_toptheta.kernels.gpu.threshold_kernel import launch_thresholds

MIN_ROW_BYTES = 32  # of a row of codes: the depth of a product of int8


def decode(step: DecodeStep, call: LayerCall, scratch: ShadowScratch) -> None:
    """One new token per sequence: score every shadow key, read the exact keys of candidates and survivors' value rows.

    A token is a candidate if its shadow reaches threshold minus margin for some head of the group, if it is an
    anchor, or if it lies in the page of the new token. Candidates whose exact score
    reaches a head's threshold are its survivors. The others enter its softmax denominator by their scores, and keys
    that are no candidates as r(n) * exp(threshold) each, where n is the length of the sequence.

    A step of few tokens, or of short sequences, as the scratch's `config` says, is faster if all keys are read: it is
    answered as by `values.decode`.

    Four launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
    can be captured in a CUDA graph. Any number of candidates is right, however unlikely. Bits of the output do not
    depend on what `scratch` held. The lost mass that is counted is an estimate as far as it lies in keys that were not
    read.

    Args:
        step: The step.
        call: Of a layer with thresholds and shadow keys.
        scratch: For at least as many sequences.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    given = ShadowStep.of(step, call, scratch)
    shadow, codes = call.layer.shadow, call.cache.codes
    if shadow is None or codes is None:
        raise ValueError("shadow: None, expected a layer with shadow keys")
    block_size, row_tokens = codes.shape[2], max(1, MIN_ROW_BYTES // shadow.codec.code_bytes)
    if codes.stride(0) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected blocks at multiples of 16 bytes")
    if block_size % row_tokens:
        raise ValueError(f"codes: pages of {block_size} tokens, expected a multiple of {row_tokens}")
    if call.query.shape[0] == 0:
        return
    keys = Shadow.of(shadow, codes, (scratch.query_codes, scratch.floors))
    split = given.split
    launch_thresholds(step, split.tokens, split.queries, split.shape, is_early=given.launches.is_early)
    launch_queries(given, scratch, keys, tokens_at_once=TOKENS_PER_STEP)
    candidates = Lists(scratch.candidates, scratch.candidate_order)
    launch_split(given, scratch.config, keys, candidates, row_tokens=row_tokens)
    launch_merge(step, call, split.pieces, given.launches, given.choice)
