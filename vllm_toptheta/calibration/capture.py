"""Observes the k-th largest score of every row while a model reads a text.

With top-k at calibration (TAKC; Top-Theta Attention, arXiv 2502.08363) a layer hands on the output of exact top-k
attention, so that deeper layers are calibrated on the activations they will see when served.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from vllm_toptheta.calibration.route import BLOCK_BYTES, AttentionRoute, row_blocks
from vllm_toptheta.reference import causal_value_mean

__all__ = ["TopKRoute", "kth_largest", "observe_top_k"]


class TopKRoute(AttentionRoute):
    """Reports the k-th largest score of every row, for every layer it is asked for.

    Args:
        target_ks: the k to observe.
        sparse_k: hand on exact top-k attention with this k, one of `target_ks`, with exact denominator and value mean
            compensation; None to hand on dense attention.
        dense_layers: layers that hand on dense attention whatever `sparse_k` is. They are observed all the same, so
            that they can be made sparse later.
        report: called with the layer and `[len(target_ks), num_heads, seq_len]` float32, scaled logits; row i sees
            i + 1 keys, and holds minus infinity where that is less than k.
    """

    def __init__(
        self,
        *,
        target_ks: Sequence[int],
        sparse_k: int | None,
        dense_layers: Collection[int],
        report: Callable[[int, Tensor], None],
    ) -> None:
        self.target_ks = target_ks
        self.sparse_k = sparse_k
        self.dense_layers = dense_layers
        self.report = report

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        output, kth_scores = observe_top_k(
            query,
            key,
            value,
            target_ks=self.target_ks,
            sparse_k=None if layer_idx in self.dense_layers else self.sparse_k,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
        )
        self.report(layer_idx, kth_scores)
        return output


def observe_top_k(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    target_ks: Sequence[int],
    sparse_k: int | None,
    softmax_scale: float,
    soft_cap: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Causal attention over a whole sequence, dense or exact top-k, that also returns k-th largest scores.

    Agrees with `reference.top_k_attention` and `reference.dense_attention`. It exists beside them for speed:
    calibration spends most of its time here, so scores stay in the cache from their product to the output.

    Args:
        query: `[seq_len, num_heads, head_size]` float.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        target_ks: the k to observe, each at least 1.
        sparse_k: the output keeps the scores that reach the k-th largest with this k, one of `target_ks`, with exact
            denominator and value mean compensation; None for dense attention.
        softmax_scale: factor on the products of query and key.
        soft_cap: cap on the scores, scaled logits; None for a model without one.
        block_bytes: bytes that the scores of a block of rows may take.

    Returns:
        The output `[seq_len, num_heads, head_size]` float32, and the k-th largest scores
        `[len(target_ks), num_heads, seq_len]` float32, scaled logits; minus infinity where a row sees fewer than k
        keys.
    """
    seq_len, num_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    # heads first, and the heads of a group as rows of one product
    queries = (query.float() * softmax_scale).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    keys = key.float().permute(1, 2, 0)
    values = value.float().transpose(0, 1).contiguous()
    value_mean = causal_value_mean(value.float(), seq_len).transpose(0, 1).unsqueeze(1)
    output = torch.empty_like(queries)
    kth_scores = queries.new_full((len(target_ks), *queries.shape[:-1]), -torch.inf)

    for start, stop in row_blocks(num_heads, seq_len, block_bytes):
        rows = queries[:, :, start:stop]
        scores = (rows.flatten(1, 2) @ keys[..., :stop]).unflatten(1, rows.shape[1:3])
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        in_future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(in_future, -torch.inf)

        for index, k in enumerate(target_ks):
            if k <= stop:
                kth_scores[index, :, :, start:stop] = kth_largest(scores, k)
        kept = None
        if sparse_k is not None and sparse_k < stop:
            # 1.0 and 0.0: a product with floats is several times faster than masking by booleans
            threshold = kth_scores[target_ks.index(sparse_k), :, :, start:stop, None]
            kept = torch.ge(scores, threshold, out=torch.empty_like(scores))

        weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
        denominator = weights.sum(dim=-1, keepdim=True)
        if kept is not None:
            weights.mul_(kept)
        block = (weights.flatten(1, 2) @ values[:, :stop]).unflatten(1, rows.shape[1:3])
        if kept is not None:
            lost = denominator - weights.sum(dim=-1, keepdim=True)
            block.addcmul_(lost, value_mean[:, :, start:stop])
        output[:, :, start:stop] = block.div_(denominator)
    return output.flatten(0, 1).transpose(0, 1), kth_scores.flatten(1, 2)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """Returns the k-th largest score of every row, faster than a partial sort of long rows.

    A row is cut into columns of a few scores. Its k largest scores lie in the k columns with the largest maxima: any
    other column has k maxima at or above everything in it. So only those columns are searched.

    Args:
        scores: `[..., seq_len]` float.
        k: at least 1, at most `seq_len`.

    Returns:
        `[...]` of the dtype of `scores`.
    """
    seq_len = scores.shape[-1]
    height = math.isqrt(seq_len // k)  # makes both searches about equally long
    if height < 4:  # where two short searches are no faster than a long one
        return scores.topk(k, sorted=False).values.amin(dim=-1)
    width = seq_len // height
    columns = scores[..., : height * width].unflatten(-1, (height, width))
    best = columns.amax(dim=-2).topk(k, sorted=False).indices
    in_best = columns.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], height, k)).flatten(-2)
    candidates = torch.cat([in_best, scores[..., height * width :]], dim=-1)
    return candidates.topk(k, sorted=False).values.amin(dim=-1)
