"""What each layer of a window reads and loses, row by row; and the exact top-k that reads as much."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.reference import AttentionResult, causal_scores

__all__ = ["EqualRows", "WindowReads", "WindowRecorder"]

# rows of a window from which the k of equal reads is taken: each takes a sort of all keys, in every layer and head
_SAMPLED_ROWS = 16
_K_STEP = 8


@dataclass(frozen=True)
class WindowReads:
    """What the layers without a sliding window read for a window.

    Attributes:
        layers: `[num_layers]` int64, which layers of the model, ascending.
        sparse_layers: `[num_sparse_layers]` int64, those of them that are thresholded.
        row_lengths: `[num_rows]` int64, keys that each row sees.
        keys: `[num_layers, num_rows, num_kv_heads]` int32, read exactly; all in dense layers.
        value_rows: `[num_layers, num_rows, num_kv_heads]` int32, read exactly by any head of the group; all in dense
            layers.
        copies: `[num_layers, num_rows, num_kv_heads]` int32, values that any head of the group reads as copies.
        survivors: `[num_sparse_layers, num_rows, num_heads]` int32.
        lost_mass: `[num_sparse_layers, num_rows, num_heads]` float32, share of the dense softmax that does not survive.
    """

    layers: NDArray[np.int64]
    sparse_layers: NDArray[np.int64]
    row_lengths: NDArray[np.int64]
    keys: NDArray[np.int32]
    value_rows: NDArray[np.int32]
    copies: NDArray[np.int32]
    survivors: NDArray[np.int32]
    lost_mass: NDArray[np.float32]


class WindowRecorder:
    """Records a pass over a window; an observer of `window.read_window`."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Tensor]] = {}
        self._value_rows: dict[int, list[Tensor]] = {}
        self._copies: dict[int, list[Tensor]] = {}
        self._survivors: dict[int, list[Tensor]] = {}
        self._lost_mass: dict[int, list[Tensor]] = {}

    def __call__(self, call: AttentionCall, result: AttentionResult | None) -> None:
        """See `window.read_window`."""
        layer = call.layer_idx
        if result is None:
            lengths = torch.arange(call.num_before + 1, len(call.key) + 1)
            whole = lengths[:, None].expand(-1, call.key.shape[1])
            self._keys[layer] = [whole]
            self._value_rows[layer] = [whole]
            self._copies[layer] = [torch.zeros_like(whole)]
            return
        copies = torch.zeros_like(result.keys_read) if result.copies_read is None else result.copies_read
        self._keys.setdefault(layer, []).append(result.keys_read.cpu())
        self._value_rows.setdefault(layer, []).append(result.value_rows_read.cpu())
        self._copies.setdefault(layer, []).append(copies.cpu())
        self._survivors.setdefault(layer, []).append(result.num_survivors.cpu())
        self._lost_mass.setdefault(layer, []).append(result.true_lost_mass.cpu())

    def reads(self, row_lengths: Sequence[int]) -> WindowReads:
        """Returns what was recorded.

        Args:
            row_lengths: keys that each row of the window sees.
        """
        layers, sparse_layers = sorted(self._value_rows), sorted(self._survivors)

        def stacked(found: dict[int, list[Tensor]], layers: list[int]) -> Tensor:
            return torch.stack([torch.cat(found[layer]) for layer in layers]) if layers else torch.empty(0, 0, 0)

        return WindowReads(
            layers=np.array(layers, np.int64),
            sparse_layers=np.array(sparse_layers, np.int64),
            row_lengths=np.array(row_lengths, np.int64),
            keys=stacked(self._keys, layers).numpy().astype(np.int32),
            value_rows=stacked(self._value_rows, layers).numpy().astype(np.int32),
            copies=stacked(self._copies, layers).numpy().astype(np.int32),
            survivors=stacked(self._survivors, sparse_layers).numpy().astype(np.int32),
            lost_mass=stacked(self._lost_mass, sparse_layers).numpy().astype(np.float32),
        )


class EqualRows:
    """Finds, in a dense pass, the k with which exact top-k reads as many value rows as an attention does.

    Both are applied to the scores of some rows of the dense pass, evenly spaced over the window. With k, a group reads
    the keys that are among the k largest of any of its heads, so one sort gives the rows read of every k.

    Args:
        attention: what to compare with.
        max_length: keys of the longest row.
    """

    def __init__(self, attention: SparseAttention, *, max_length: int) -> None:
        self._attention = attention
        self._rows_read = 0
        # how many keys a group begins to read at k = 1, 2...
        self._new_rows = torch.zeros(max_length, dtype=torch.int64)

    def __call__(self, call: AttentionCall, result: AttentionResult | None) -> None:
        """See `window.read_window`."""
        num_before, num_kv_heads = call.num_before, call.key.shape[1]
        step = -(-len(call.query) // _SAMPLED_ROWS)
        for row in range(step - 1, len(call.query), step):
            seen = num_before + row + 1
            one = replace(call, query=call.query[row : row + 1], key=call.key[:seen], value=call.value[:seen])
            sparse = self._attention.attend(one, num_prompt_tokens=num_before)
            self._rows_read += int(sparse.value_rows_read.sum())
            scores = causal_scores(one.query, one.key, softmax_scale=one.softmax_scale, logits_soft_cap=one.soft_cap)[0]
            ranks = torch.empty_like(scores, dtype=torch.int64)
            order = scores.argsort(dim=-1, descending=True)
            ranks.scatter_(1, order, torch.arange(seen, device=order.device).expand_as(order))
            of_groups = ranks.unflatten(0, (num_kv_heads, -1)).amin(dim=1).flatten().cpu()
            self._new_rows += torch.bincount(of_groups, minlength=len(self._new_rows))

    @property
    def target_k(self) -> int:
        """The least multiple of 8 that reads at least as many rows."""
        rows_read = self._new_rows.cumsum(0)
        k = 1 + int((rows_read < self._rows_read).sum())
        return -(-k // _K_STEP) * _K_STEP
