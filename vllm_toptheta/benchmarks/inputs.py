"""A decode step that is timed: random queries, keys and values, or such as keep what a pattern says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from vllm_toptheta.kernels.contract import (
    NUM_COEFFICIENTS,
    DecodeStep,
    Layer,
    LayerCache,
    LayerThresholds,
    ShadowLayer,
    TailStep,
    TierLayer,
)
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.pages import padded_page_bytes, value_sum_view
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import anchor_lse, causal_scores

Anchors = Literal["followed", "scored", "none"]
LONGEST = 2**20  # tokens that thresholds are said to be calibrated for
CALIBRATION_SEQUENCES = 4
BELOW = -30.0  # the score of keys that a pattern does not keep; bfloat16 and float8 have it
LIGHT = -8.0  # of those that it keeps, and that are light where there are copies
LOG_HEAVY = -5.0  # between that and 0, whatever the anchors are
FILL_BLOCKS = 4096  # pages filled with random numbers at a time


class StepShape(NamedTuple):
    """The sizes of a step but for its lengths, and how many keys survive in it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    target_k: int


@dataclass(frozen=True)
class Inputs:
    """A decode step on random keys and values in pages as vLLM lays them out.

    Attributes:
        query: [num_seqs * query_len, num_heads, head_size], sequence by sequence.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], token first in memory, with page tails.
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32.
        max_seq_len: The longest of them.
        absolute, relative: [num_heads, 4] float32, coefficients of thresholds calibrated on these very scores: the same
            threshold for every sequence, or relative to its anchors, as it is served.
        query_len: New tokens of each sequence, the last ones of it.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    absolute: torch.Tensor
    relative: torch.Tensor
    query_len: int = 1

    @classmethod
    def random(
        cls,
        lens: list[int],
        shape: StepShape,
        *,
        code_bytes: int = 0,
        key_scales: torch.Tensor | None = None,
        query_len: int = 1,
    ) -> Inputs:
        """Normally distributed queries, keys and values; thresholds at the `target_k`-th largest scores.

        `code_bytes` of shadow keys or copies fit into the tails for every token and kv head; `key_scales` [head_size]
        are factors on the channels of the keys.
        """
        num_heads, num_kv_heads, head_size, block_size, dtype, kv_dtype, target_k = shape
        torch.manual_seed(0)
        pages = [-(-length // block_size) for length in lens]
        num_blocks = 1 + sum(pages)
        width = 2 * head_size
        content = num_kv_heads * block_size * width
        page_codes = num_kv_heads * block_size * code_bytes
        page_bytes = padded_page_bytes(content * kv_dtype.itemsize, num_kv_heads, head_size, code_bytes=page_codes)
        stride = page_bytes // kv_dtype.itemsize
        memory = torch.empty(num_blocks * stride, dtype=kv_dtype, device="cuda")
        kv_cache = memory.as_strided(
            (num_blocks, num_kv_heads, block_size, width), (stride, width, num_kv_heads * width, 1)
        )
        for start in range(0, num_blocks, FILL_BLOCKS):
            chunk = kv_cache[start : start + FILL_BLOCKS]
            tokens = torch.randn(chunk.shape, device="cuda")
            if key_scales is not None:
                tokens[..., :head_size] *= key_scales
            chunk.copy_(tokens)
        # the value of the sums changes no timing
        value_sum_view(kv_cache).zero_()
        order = (torch.randperm(num_blocks - 1, device="cuda") + 1).int()
        block_table = torch.zeros(len(lens), max(pages), dtype=torch.int32, device="cuda")
        for row, blocks in enumerate(order.split(pages)):
            block_table[row, : len(blocks)] = blocks
        inputs = cls(
            query=torch.randn(len(lens) * query_len, num_heads, head_size, device="cuda").to(dtype),
            kv_cache=kv_cache,
            block_table=block_table,
            seq_lens=torch.tensor(lens, dtype=torch.int32, device="cuda"),
            max_seq_len=max(lens),
            absolute=torch.zeros(num_heads, NUM_COEFFICIENTS, device="cuda"),
            relative=torch.zeros(num_heads, NUM_COEFFICIENTS, device="cuda"),
            query_len=query_len,
        )
        rows = range(min(len(lens), CALIBRATION_SEQUENCES))
        scores = [inputs.scores(row) for row in rows]
        largest = torch.stack([row.topk(min(target_k, row.shape[1])).values[:, -1] for row in scores])
        inputs.absolute[:, 0] = largest.mean(0)
        inputs.relative[:, 0] = (largest - torch.stack([inputs.anchor_lse(row) for row in rows])).mean(0)
        inputs.relative[:, 3] = 1.0
        return inputs

    def replay(self, survivors: Sequence[torch.Tensor], *, heavy_share: float = 1.0) -> Inputs:
        """The step with other queries and keys, written over these, so that just the keys of a pattern survive.

        Query head i of a group looks at channel i of the keys alone, which scores 0 if it survives and `BELOW` if not.
        A sequence in which a head keeps no anchor keeps its last key too, as real ones do. New tokens of a sequence
        keep the same keys.

        Args:
            survivors: Of each sequence, [num_kv_heads, group, seq_len] bool.
            heavy_share: Of a head's survivors; the others score `LIGHT`. Which is chance.
        """
        torch.manual_seed(0)
        num_tokens, num_heads, head_size = self.query.shape
        _, num_kv_heads, block_size, _ = self.kv_cache.shape
        group = num_heads // num_kv_heads
        members = torch.arange(num_heads, device=self.query.device) % group
        one_hot = torch.nn.functional.one_hot(members, head_size) / self.softmax_scale
        self.query.copy_(one_hot.expand(num_tokens, -1, -1))
        for row, of_sequence in enumerate(survivors):
            kept = of_sequence.to(self.query.device, copy=True)
            length = kept.shape[2]
            # those of all new tokens
            last_anchors = kept[..., -NUM_LAST_ANCHORS : length - self.query_len + 1]
            anchors = torch.cat([kept[..., :NUM_FIRST_ANCHORS], last_anchors], dim=2)
            kept[..., -self.query_len :] |= ~anchors.any(dim=2, keepdim=True)
            position = torch.arange(length, device=kept.device)
            blocks = self.block_table[row, position // block_size].long()
            is_heavy = torch.rand(kept.shape, device=kept.device) < heavy_share
            is_heavy[..., -1] = True
            scores = torch.where(kept, torch.where(is_heavy, 0.0, LIGHT), BELOW)
            scores = scores.permute(2, 0, 1).to(self.kv_cache.dtype)
            _writable(self.kv_cache)[blocks, :, position % block_size, :group] = _writable(scores)
        # no head keeps more than all anchors, so anchor_lse is 0 to ln(144), and half way down lies between both scores
        absolute, relative = torch.zeros_like(self.absolute), torch.zeros_like(self.relative)
        absolute[:, 0] = relative[:, 0] = BELOW / 2
        relative[:, 3] = 1.0
        return replace(self, absolute=absolute, relative=relative)

    def sequence(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, [seq_len, num_kv_heads, head_size] float32."""
        block_size = self.kv_cache.shape[2]
        length = int(self.seq_lens[row])
        blocks = self.block_table[row, : -(-length // block_size)].long()
        pages = _writable(self.kv_cache)[blocks].view(self.kv_cache.dtype).float()
        tokens = pages.transpose(1, 2).flatten(0, 1)[:length]
        key, value = tokens.chunk(2, dim=-1)
        return key, value

    def scores(self, row: int) -> torch.Tensor:
        """[num_heads, seq_len] float32, scaled logits of a sequence's last token."""
        keys, _ = self.sequence(row)
        query = self.query.unflatten(0, (-1, self.query_len))[row, -1:]
        return causal_scores(query.float(), keys, softmax_scale=self.softmax_scale)[0]

    def anchor_lse(self, row: int) -> torch.Tensor:
        """[num_heads] float32, that of a sequence."""
        return anchor_lse(self.scores(row)[None], self.seq_lens[row : row + 1].long())[0]

    def threshold(self, row: int) -> torch.Tensor:
        """[num_heads] float32, the relative one of a sequence that does not keep every key."""
        return self.relative[:, 0] + self.anchor_lse(row)

    def thresholds(self, anchors: Anchors = "followed") -> LayerThresholds:
        """What the kernels compare with."""
        return LayerThresholds(self.relative if anchors == "followed" else self.absolute, anchors != "none")

    def step(
        self, *, max_dense_len: int = NUM_ANCHORS, min_step_tokens: int = 0, per_request: bool = True
    ) -> DecodeStep:
        """The step; with `per_request` every sequence has an offset, although all are 0."""
        return DecodeStep(
            self.block_table,
            self.seq_lens,
            max_dense_len,
            min_step_tokens,
            length_range=(1, LONGEST),
            threshold_offset=torch.zeros(len(self.seq_lens), device=self.query.device) if per_request else None,
            query_start_loc=self.query_start_loc if self.query_len > 1 else None,
            max_query_len=self.query_len,
        )

    @property
    def query_start_loc(self) -> torch.Tensor:
        """[num_seqs + 1] int32."""
        starts = torch.arange(len(self.seq_lens) + 1, dtype=torch.int32, device=self.query.device)
        return starts * self.query_len

    def write_tails(self, shadow: ShadowLayer | None = None, tiers: TierLayer | None = None) -> None:
        """Write the value sums of all full pages, and their codes if there is a codec."""
        starts = torch.zeros(len(self.seq_lens) + 1, dtype=torch.int32, device=self.query.device)
        starts[1:] = self.seq_lens.cumsum(0)
        layer = Layer(self.softmax_scale, thresholds=self.thresholds(), shadow=shadow, tiers=tiers)
        step = TailStep(self.block_table, self.seq_lens, starts, self.max_seq_len)
        write_tails(step, LayerCache.of(self.kv_cache, layer), layer)

    @property
    def softmax_scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the step's keys and values."""
        _, num_kv_heads, _, width = self.kv_cache.shape
        return int(self.seq_lens.sum()) * num_kv_heads * width * self.kv_cache.element_size()


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes, of a dtype that can be indexed: float8 cannot."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
