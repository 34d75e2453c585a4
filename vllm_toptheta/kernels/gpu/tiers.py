"""Top-Theta attention of one new token per sequence by tiers, on the GPU: exact rows, copies, and the mean value."""

from __future__ import annotations

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall
from vllm_toptheta.kernels.gpu.copies import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.cuda.tier_copy import launch_tier_copy
from vllm_toptheta.kernels.gpu.cuda.tier_split import launch_tier_split
from vllm_toptheta.kernels.gpu.merge import launch_merge
from vllm_toptheta.kernels.gpu.records import Copies, Lists
from vllm_toptheta.kernels.gpu.scratch import TierScratch
from vllm_toptheta.kernels.gpu.shadow_step import ShadowStep, launch_queries, launch_split
from vllm_toptheta.kernels.gpu.threshold_kernel import launch_thresholds
from vllm_toptheta.kernels.gpu.values import check_cuda
from vllm_toptheta.limits import gpus_lack


def decode(step: DecodeStep, call: LayerCall, scratch: TierScratch) -> None:
    """One new token per sequence: score the copies of all keys, read heavy rows exactly and light values as copies.

    `reference.tiers` has the formulas. A step of few tokens, or of short sequences, as the scratch's `config` says, is
    faster if all keys are read: it is answered as by `values.decode`.

    Four launches, five by the kernels in CUDA C++, whose grids depend on shapes only; nothing is allocated and the host
    waits for nothing, so the call can be captured in a CUDA graph. Any number of heavy and light keys is right, however
    unlikely. Bits of the output do not depend on what `scratch` held.

    Args:
        step, scratch: As for `shadow.decode`.
        call: Of a layer with relative thresholds and tiers.

    Raises:
        ValueError: As for `shadow.decode`.
    """
    given = ShadowStep.of(step, call, scratch)
    tiers, codes = call.layer.tiers, call.cache.codes
    if tiers is None or codes is None:
        raise ValueError("tiers: None, expected a layer with copies")
    _, num_heads, head_size = call.query.shape
    if lacking := gpus_lack(head_size, num_heads, codes.shape[1], has_copies=True):
        raise ValueError(f"query: {lacking}")
    if scratch.loader is not None:
        check_cuda(call)
    if codes.stride(0) % 16 or codes.stride(1) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected blocks and heads at multiples of 16 bytes")
    if call.query.shape[0] == 0:
        return
    copies = Copies.of(tiers, codes, (scratch.query_codes, scratch.query_terms))
    early, split = given.launches.is_early, given.split
    if scratch.loader is None:
        launch_thresholds(step, split.tokens, split.queries, split.shape, is_early=early)
        launch_queries(given, scratch, copies, tokens_at_once=TOKENS_PER_STEP)
        heavy, light = Lists(scratch.heavy, scratch.heavy_order), Lists(scratch.light, scratch.light_order)
        launch_split(given, scratch.config, copies, heavy, light, log_heavy=tiers.log_heavy)
    else:
        # Nobody needs these copies in this step. The scan begins while thresholds are worked out, so nothing that waits
        # on its multiprocessors stands in front: what answers a step of which all keys are read comes behind it.
        launch_tier_copy(scratch.loader, split.tokens, copies, max_query_len=1, is_early=early)
        launch_thresholds(step, split.tokens, split.queries, split.shape, is_early=early, is_second=True)
        launch_tier_split(
            scratch.loader,
            split,
            copies,
            scratch.saved,
            given.launches.head_programs,
            few_tokens=given.choice.few_tokens,
            short_length=given.choice.short_length,
            log_heavy=tiers.log_heavy,
            is_early=early,
        )
        launch_queries(given, scratch, copies, tokens_at_once=0)
    launch_merge(step, call, split.pieces, given.launches, given.choice)
