"""The truth in plain PyTorch: every mode of Top-Theta attention (arXiv 2502.08363), contiguous and paged.

May import `limits`, `rotation`.
"""

from vllm_toptheta.reference.attention import (
    AttentionResult,
    Placement,
    dense_attention,
    top_k_attention,
    top_theta_attention,
)
from vllm_toptheta.reference.compensation import FULL_COMPENSATION, Compensation, Denominator, causal_value_mean
from vllm_toptheta.reference.paged import gather_sequence, paged_top_theta_attention
from vllm_toptheta.reference.relative import anchor_lse, is_anchor, relative_threshold
from vllm_toptheta.reference.scores import causal_scores, group_counts, row_lse
from vllm_toptheta.reference.shadow import (
    KeyProjection,
    ShadowQuery,
    always_candidates,
    candidate_keys,
    encode_keys,
    fit_projection,
    pack_codes,
    quantize_query,
    shadow_scores,
    unpack_codes,
)
from vllm_toptheta.reference.thresholds import (
    Phase,
    keep_last,
    kth_largest_score,
    kth_largest_scores,
    score_threshold,
    select_survivors,
    thresholded_rows,
)
from vllm_toptheta.reference.tiers import (
    KeyCopies,
    TieredResult,
    ValueCopies,
    copy_keys,
    copy_scores,
    copy_values,
    key_centre,
    tiered_attention,
)

__all__ = [
    "FULL_COMPENSATION",
    "AttentionResult",
    "Compensation",
    "Denominator",
    "KeyCopies",
    "KeyProjection",
    "Phase",
    "Placement",
    "ShadowQuery",
    "TieredResult",
    "ValueCopies",
    "always_candidates",
    "anchor_lse",
    "candidate_keys",
    "causal_scores",
    "causal_value_mean",
    "copy_keys",
    "copy_scores",
    "copy_values",
    "dense_attention",
    "encode_keys",
    "fit_projection",
    "gather_sequence",
    "group_counts",
    "is_anchor",
    "keep_last",
    "key_centre",
    "kth_largest_score",
    "kth_largest_scores",
    "pack_codes",
    "paged_top_theta_attention",
    "quantize_query",
    "relative_threshold",
    "row_lse",
    "score_threshold",
    "select_survivors",
    "shadow_scores",
    "thresholded_rows",
    "tiered_attention",
    "top_k_attention",
    "top_theta_attention",
    "unpack_codes",
]
