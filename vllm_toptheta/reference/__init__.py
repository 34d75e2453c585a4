"""The truth in plain PyTorch: every mode of Top-Theta attention (arXiv 2502.08363), contiguous and paged."""

from vllm_toptheta.reference.attention import (
    AttentionResult,
    Placement,
    causal_scores,
    dense_attention,
    top_k_attention,
    top_theta_attention,
)
from vllm_toptheta.reference.compensation import FULL_COMPENSATION, Compensation, Denominator, causal_value_mean
from vllm_toptheta.reference.paged import gather_sequence, paged_top_theta_attention
from vllm_toptheta.reference.thresholds import (
    keep_last,
    kth_largest_score,
    kth_largest_scores,
    score_threshold,
    select_survivors,
)

__all__ = [
    "FULL_COMPENSATION",
    "AttentionResult",
    "Compensation",
    "Denominator",
    "Placement",
    "causal_scores",
    "causal_value_mean",
    "dense_attention",
    "gather_sequence",
    "keep_last",
    "kth_largest_score",
    "kth_largest_scores",
    "paged_top_theta_attention",
    "score_threshold",
    "select_survivors",
    "top_k_attention",
    "top_theta_attention",
]
