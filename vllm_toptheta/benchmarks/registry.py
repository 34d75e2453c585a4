"""The decode attention kernels that are compared, all on the same paged cache; each is imported when it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from vllm_toptheta.kernels.contract import (
    NUM_COEFFICIENTS,
    Counters,
    DecodeStep,
    Layer,
    LayerCache,
    LayerCall,
    LayerThresholds,
    ShadowLayer,
    TailStep,
)
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, num_multiprocessors
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.kernels.pages import padded_page_bytes, value_sum_view
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import anchor_lse, causal_scores

Call = Callable[[], Any]
Anchors = Literal["followed", "scored", "none"]
Dense = Literal["never", "served", "always"]
KEEPS_EVERYTHING = 2**31 - 1  # as max_dense_len
LONGEST = 2**20  # tokens that thresholds are said to be calibrated for
CALIBRATION_SEQUENCES = 4
BELOW = -30.0  # the score of keys that a pattern does not keep; bfloat16 and float8 have it
FILL_BLOCKS = 4096  # pages filled with random numbers at a time


@dataclass(frozen=True)
class Inputs:
    """A decode step on random keys and values in pages as vLLM lays them out.

    Attributes:
        query: [num_seqs, num_heads, head_size].
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], token first in memory, with page tails.
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32.
        max_seq_len: The longest of them.
        absolute, relative: [num_heads, 4] float32, coefficients of thresholds calibrated on these very scores: the same
            threshold for every sequence, or relative to its anchors, as it is served.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    absolute: torch.Tensor
    relative: torch.Tensor

    @classmethod
    def random(
        cls,
        lens: list[int],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        target_k: int,
        code_bytes: int = 0,
        key_scales: torch.Tensor | None = None,
    ) -> Inputs:
        """Normally distributed queries, keys and values; thresholds at the `target_k`-th largest scores.

        `code_bytes` of shadow keys fit into the tails for every token and kv head; `key_scales` [head_size] are factors
        on the channels of the keys.
        """
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
            query=torch.randn(len(lens), num_heads, head_size, device="cuda").to(dtype),
            kv_cache=kv_cache,
            block_table=block_table,
            seq_lens=torch.tensor(lens, dtype=torch.int32, device="cuda"),
            max_seq_len=max(lens),
            absolute=torch.zeros(num_heads, NUM_COEFFICIENTS, device="cuda"),
            relative=torch.zeros(num_heads, NUM_COEFFICIENTS, device="cuda"),
        )
        rows = range(min(len(lens), CALIBRATION_SEQUENCES))
        scores = [inputs.scores(row) for row in rows]
        largest = torch.stack([row.topk(min(target_k, row.shape[1])).values[:, -1] for row in scores])
        inputs.absolute[:, 0] = largest.mean(0)
        inputs.relative[:, 0] = (largest - torch.stack([inputs.anchor_lse(row) for row in rows])).mean(0)
        inputs.relative[:, 3] = 1.0
        return inputs

    def replay(self, survivors: Sequence[torch.Tensor]) -> Inputs:
        """The step with other queries and keys, written over these, so that just the keys of a pattern survive.

        Query head i of a group looks at channel i of the keys alone, which scores 0 if it survives and `BELOW` if not.
        A sequence in which a head keeps no anchor keeps its last key too, as real ones do.

        Args:
            survivors: Of each sequence, [num_kv_heads, group, seq_len] bool.
        """
        num_seqs, num_heads, head_size = self.query.shape
        _, num_kv_heads, block_size, _ = self.kv_cache.shape
        group = num_heads // num_kv_heads
        members = torch.arange(num_heads, device=self.query.device) % group
        one_hot = torch.nn.functional.one_hot(members, head_size) / self.softmax_scale
        self.query.copy_(one_hot.expand(num_seqs, -1, -1))
        for row, of_sequence in enumerate(survivors):
            kept = of_sequence.to(self.query.device, copy=True)
            length = kept.shape[2]
            anchors = torch.cat([kept[..., :NUM_FIRST_ANCHORS], kept[..., -NUM_LAST_ANCHORS:]], dim=2)
            kept[..., -1] |= ~anchors.any(dim=2)
            position = torch.arange(length, device=kept.device)
            blocks = self.block_table[row, position // block_size].long()
            scores = torch.where(kept, 0.0, BELOW).permute(2, 0, 1).to(self.kv_cache.dtype)
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
        """[num_heads, seq_len] float32, scaled logits of a sequence."""
        keys, _ = self.sequence(row)
        return causal_scores(self.query[row : row + 1].float(), keys, softmax_scale=self.softmax_scale)[0]

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
        )

    def write_tails(self, shadow: ShadowLayer | None = None) -> None:
        """Write the value sums of all full pages, and their codes if there is a codec."""
        starts = torch.zeros(len(self.seq_lens) + 1, dtype=torch.int32, device=self.query.device)
        starts[1:] = self.seq_lens.cumsum(0)
        layer = Layer(self.softmax_scale, thresholds=self.thresholds(), shadow=shadow)
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


def toptheta(
    inputs: Inputs,
    *,
    dense: Dense = "never",
    per_request: bool = True,
    anchors: Anchors = "followed",
    count: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Call, Counters]:
    """Our kernel, and what it adds to.

    Args:
        inputs: The step.
        dense: Whether every key is kept: as is best where it is served without a `min_context`, or in any case.
        per_request: Whether every sequence has an offset, although all are 0; else it has none.
        anchors: Whether thresholds follow the anchors of each sequence, as they are served; or are the same for all
            sequences, be it that their anchors are scored nevertheless.
        count: Whether it counts.
        config: Launch parameters instead of the table's.
    """
    num_seqs, num_heads, head_size = inputs.query.shape
    num_kv_heads = inputs.kv_cache.shape[1]
    device = inputs.query.device
    counters = Counters.allocate(num_heads, num_kv_heads, device)
    sizes = Sizes(num_seqs, num_heads, num_kv_heads, head_size)
    scratch = Scratch.allocate(sizes, kv_dtype=inputs.kv_cache.dtype, device=device, config=config)
    layer = Layer(
        inputs.softmax_scale,
        thresholds=inputs.thresholds(anchors),
        counters=counters if count else None,
    )
    longest = {"never": NUM_ANCHORS, "served": scratch.config.dense_length, "always": KEEPS_EVERYTHING}[dense]
    num_programs = scratch.config.num_programs(num_kv_heads, num_multiprocessors(device))
    fewest = scratch.config.dense_tokens * num_programs if dense == "served" else 0
    step = inputs.step(max_dense_len=longest, min_step_tokens=fewest, per_request=per_request)
    call = LayerCall(inputs.query, torch.empty_like(inputs.query), LayerCache.of(inputs.kv_cache, layer), layer)
    return lambda: decode(step, call, scratch), counters


def flash_attention_3(inputs: Inputs, *, num_splits: int = 0) -> Call:
    """FlashAttention-3 as vLLM calls it, its schedule computed ahead; 0 splits leaves their number to it.

    Raises:
        ImportError: vLLM or its FlashAttention is not installed.
        RuntimeError: It does not run on this GPU or with this cache.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    num_seqs, num_heads, head_size = inputs.query.shape
    keys, values = (half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    query = inputs.query if keys.dtype.itemsize > 1 else inputs.query.to(keys.dtype)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch_size=num_seqs,
        max_seqlen_q=1,
        max_seqlen_k=inputs.max_seq_len,
        num_heads_q=num_heads,
        num_heads_kv=keys.shape[2],
        headdim=head_size,
        cache_seqlens=inputs.seq_lens,
        qkv_dtype=query.dtype,
        cu_seqlens_q=starts,
        page_size=keys.shape[1],
        causal=True,
        num_splits=num_splits,
    )
    output = torch.empty_like(inputs.query)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=inputs.seq_lens,
        max_seqlen_k=inputs.max_seq_len,
        softmax_scale=inputs.softmax_scale,
        causal=True,
        block_table=inputs.block_table,
        fa_version=3,
        scheduler_metadata=schedule,
        num_splits=num_splits,
    )


def vllm_triton(inputs: Inputs) -> Call:
    """vLLM's Triton attention, split along the context as its backend does for small batches.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    num_seqs, num_heads, head_size = inputs.query.shape
    num_kv_heads = inputs.kv_cache.shape[1]
    keys, values = (half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    splits, max_seqs = 16, 128 // num_kv_heads  # the backend's constants
    scratch = torch.empty(max_seqs, num_heads, splits, 1 << (head_size - 1).bit_length(), device="cuda")
    scale = torch.ones(num_seqs, num_kv_heads, device="cuda")
    output = torch.empty_like(inputs.query)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
    return lambda: unified_attention(
        q=inputs.query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=inputs.seq_lens,
        max_seqlen_k=inputs.max_seq_len,
        softmax_scale=inputs.softmax_scale,
        causal=True,
        window_size=(-1, -1),
        block_table=inputs.block_table,
        softcap=0.0,
        q_descale=None,
        k_descale=scale,
        v_descale=scale,
        seq_threshold_3D=max_seqs,
        num_par_softmax_segments=splits,
        softmax_segm_output=scratch,
        softmax_segm_max=torch.empty(scratch.shape[:3], device="cuda"),
        softmax_segm_expsum=torch.empty(scratch.shape[:3], device="cuda"),
    )


def flashinfer(inputs: Inputs) -> Call:
    """FlashInfer's paged decode, planned ahead.

    Raises:
        ImportError: FlashInfer is not installed.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    num_seqs, num_heads, head_size = inputs.query.shape
    _, num_kv_heads, block_size, _ = inputs.kv_cache.shape
    pages = -(-inputs.seq_lens // block_size)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32, device="cuda")
    starts[1:] = pages.cumsum(0)
    index = torch.arange(inputs.block_table.shape[1], device="cuda")
    blocks = inputs.block_table[index < pages[:, None]].contiguous()
    last = inputs.seq_lens - (pages - 1) * block_size
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=blocks.clone(),
        paged_kv_last_page_len_buffer=last.int(),
    )
    wrapper.plan(
        starts,
        blocks,
        last.int(),
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        q_data_type=inputs.query.dtype,
        kv_data_type=inputs.kv_cache.dtype,
        sm_scale=inputs.softmax_scale,
    )
    halves = tuple(half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    output = torch.empty_like(inputs.query)
    return lambda: wrapper.run(inputs.query, halves, out=output)


# the dense kernels, the baseline first; FlashAttention's two settings are those that vLLM uses
DENSE: dict[str, Callable[[Inputs], Call]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-3, 32 splits": lambda inputs: flash_attention_3(inputs, num_splits=32),
    "vLLM Triton": vllm_triton,
    "FlashInfer": flashinfer,
}


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "vllm", "flashinfer-python"):
        try:
            found[package] = version(package)
        except ImportError:
            continue
    return found
