"""Which scores survive: the k-th largest score of a row, and the survivor sets of both placements.

Every function takes causal scores `[..., seq_len]` as `scores.causal_scores` returns them: scaled logits, minus
infinity at the keys that a row does not see. Source of the method: Top-Theta Attention, arXiv 2502.08363.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vllm_toptheta.reference.scores import row_lse

__all__ = [
    "Phase",
    "keep_last",
    "kth_largest_score",
    "kth_largest_scores",
    "per_row",
    "score_threshold",
    "select_survivors",
    "thresholded_rows",
]

Phase = Literal["prefill", "decode", "both"]


def thresholded_rows(row_lengths: Tensor, *, target_k: int, phase: Phase, num_prompt_tokens: int) -> Tensor:
    """Returns the rows whose keys a threshold decides on; the others keep all of them.

    The row of the i-th position (from 0) belongs to the prompt if i < num_prompt_tokens, and to decoding otherwise.
    `prefill` thresholds the rows of the prompt, `decode` those behind it, `both` all. Rows that see at most k keys are
    never thresholded.

    Args:
        row_lengths: `[num_rows]` int64, keys that each row sees, its own included.
        target_k: k.
        phase: which rows are thresholded.
        num_prompt_tokens: tokens of the prompt, not negative.

    Returns:
        `[num_rows]` bool.

    Raises:
        ValueError: `phase` is unknown, or `num_prompt_tokens` is negative.
    """
    if phase not in get_args(Phase):
        raise ValueError(f"phase: {phase!r} is none of {', '.join(get_args(Phase))}")
    if num_prompt_tokens < 0:
        raise ValueError(f"num_prompt_tokens: cannot be negative, got {num_prompt_tokens}")
    is_long = row_lengths > target_k
    match phase:
        case "prefill":
            return is_long & (row_lengths <= num_prompt_tokens)
        case "decode":
            return is_long & (row_lengths > num_prompt_tokens)
        case "both":
            return is_long


def kth_largest_scores(scores: Tensor, target_ks: Sequence[int]) -> Tensor:
    """Returns the k-th largest score of every row, for several k from one partial sort.

    These are what calibration aggregates into thresholds; one pass serves all k (the paper's multi-k calibration).

    Args:
        scores: `[..., seq_len]` float, scaled logits, minus infinity at the keys that a row does not see.
        target_ks: the k, each at least 1, in any order.

    Returns:
        `[..., len(target_ks)]` of the dtype of `scores`; minus infinity where a row sees fewer than k keys.

    Raises:
        ValueError: `target_ks` is empty or holds a k below 1.
    """
    if not target_ks or min(target_ks) < 1:
        raise ValueError(f"target_ks: every k must be at least 1, got {list(target_ks)}")
    largest_k, seq_len = max(target_ks), scores.shape[-1]
    largest = scores.topk(min(largest_k, seq_len)).values
    largest = torch.nn.functional.pad(largest, (0, max(0, largest_k - seq_len)), value=-torch.inf)
    return largest[..., [k - 1 for k in target_ks]]


def kth_largest_score(scores: Tensor, target_k: int) -> Tensor:
    """Returns the k-th largest score of every row: `kth_largest_scores` for a single k.

    Args:
        scores: `[..., seq_len]` float, scaled logits, minus infinity at the keys that a row does not see.
        target_k: k, at least 1.

    Returns:
        `[...]` of the dtype of `scores`; minus infinity where a row sees fewer than k keys.

    Raises:
        ValueError: `target_k` is below 1.
    """
    return kth_largest_scores(scores, [target_k])[..., 0]


def select_survivors(scores: Tensor, threshold: Tensor) -> Tensor:
    """Returns the keys whose score reaches the threshold: S = {j : s_j >= theta}.

    A tie survives, so that a threshold at the k-th largest score keeps at least k keys. A key that the row does not
    see never survives, whatever the threshold.

    Args:
        scores: `[..., seq_len]` float, scaled logits, minus infinity at the keys that a row does not see.
        threshold: `[...]` of the same dtype, scaled logits.

    Returns:
        `[..., seq_len]` bool.
    """
    # the lowest number is above the minus infinity of keys that are not seen
    return scores >= threshold.clamp(min=torch.finfo(scores.dtype).min).unsqueeze(-1)


def score_threshold(scores: Tensor, probability: Tensor, *, sinks: Tensor | None = None) -> Tensor:
    """Turns a threshold on probabilities (post-softmax placement) into the threshold on scores that selects alike.

    p_j >= theta is s_j >= m + log(Z) + log(theta), where m is the row's largest score and Z the exact denominator.

    Args:
        scores: `[..., seq_len]` float, scaled logits, minus infinity at the keys that a row does not see.
        probability: `[...]` of the same dtype, the threshold after softmax, not negative.
        sinks: as for `scores.row_lse`.

    Returns:
        `[...]` of the same dtype, scaled logits; minus infinity for a probability of 0.

    Raises:
        ValueError: a probability is negative.
    """
    if bool((probability < 0).any()):
        raise ValueError("threshold: a post-softmax threshold is a probability and cannot be negative")
    return row_lse(scores, sinks) + probability.log()


def keep_last(survivors: Tensor, cap_k: int) -> Tensor:
    """Returns the survivors without all but the last `cap_k` of every row, counted by position (the paper's capk).

    Args:
        survivors: `[..., seq_len]` bool.
        cap_k: survivors to keep at most, at least 1.

    Returns:
        `[..., seq_len]` bool.

    Raises:
        ValueError: `cap_k` is below 1.
    """
    if cap_k < 1:
        raise ValueError(f"cap_k: must be at least 1, got {cap_k}")
    count = survivors.cumsum(dim=-1, dtype=torch.int32)
    return survivors & (count > count[..., -1:] - cap_k)


def per_row(field: str, value: Tensor | float, like: Tensor) -> Tensor:
    """Broadcasts a per-row quantity, such as a threshold, to one value per query and head.

    Args:
        field: name of the quantity, for the message of an error.
        value: a number, or a tensor that broadcasts to the shape of `like`, for example `[num_heads]`.
        like: `[num_queries, num_heads]`, the tensor whose shape, dtype and device the result takes.

    Returns:
        A view `[num_queries, num_heads]`.

    Raises:
        ValueError: `value` holds NaN or does not broadcast.
    """
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if bool(tensor.isnan().any()):
        raise ValueError(f"{field}: holds NaN")
    try:
        return tensor.broadcast_to(like.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{field}: shape {list(tensor.shape)} does not broadcast to [num_queries, num_heads] = {list(like.shape)}"
        ) from error
