"""Thresholds away from every score: thresholding is discontinuous, and rounding must not move a survivor."""

from __future__ import annotations

import torch

MIN_GAP = 2e-4  # between a threshold and the nearest score, in scaled logits


def in_a_gap(scores: list[torch.Tensor], target_k: int) -> torch.Tensor:
    """One threshold a head that about `target_k` scores of every sequence reach, [num_heads].

    Args:
        scores: Of every sequence, [num_heads, seq_len].
        target_k: How many survivors are wanted.
    """
    pooled = torch.cat(scores, dim=1).sort(dim=1, descending=True).values
    if pooled.shape[1] == 1:
        return pooled[:, 0] - 1
    wanted = min(target_k * len(scores), pooled.shape[1])
    gaps = pooled[:, :-1] - pooled[:, 1:]
    distance = (torch.arange(1, pooled.shape[1], device=pooled.device) - wanted).abs().expand_as(gaps)
    distance, index = distance.masked_fill(gaps < 2.5 * MIN_GAP, pooled.shape[1]).min(dim=1)
    assert int(distance.max()) < pooled.shape[1], "no gap for a threshold"
    return (pooled - torch.nn.functional.pad(gaps, (0, 1)) / 2).gather(1, index[:, None])[:, 0]
