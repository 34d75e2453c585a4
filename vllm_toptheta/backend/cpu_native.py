"""vLLM's own CPU attention in C++, on our pages: it writes them, answers prompts, and all that is dense.

Pages hold what it expects where it works on vectors (`kernels.cpu.cache`), so nothing is copied; it skips their tails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import vllm.envs as envs
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_toptheta.kernels.contract import Layer
from vllm_toptheta.kernels.cpu.cache import halves_of

_WIDE = 32  # tokens of a page, or channels, that it takes at once where there are as many


class NativeStep:
    """Some sequences of a step, all of whose new tokens attend to everything in front of them.

    Attributes:
        tokens: Where the new tokens stand in the step's flat token axis: a slice, or [num_tokens] int64.
    """

    def __init__(
        self,
        native: NativeAttention,
        tokens: slice | torch.Tensor,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> None:
        """Take them.

        Args:
            native: Of the layers.
            tokens: See above.
            query_start_loc: [num_seqs + 1] int32, where each sequence's new tokens begin among these tokens.
            seq_lens: [num_seqs] int32, cached tokens, the new ones included.
            block_table: [num_seqs, max_blocks] int32.
        """
        self.tokens = tokens
        self._native = native
        self._query_start_loc, self._seq_lens, self._block_table = query_start_loc, seq_lens, block_table
        self._plans: dict[int, torch.Tensor] = {}

    @classmethod
    def of_rows(
        cls,
        native: NativeAttention,
        rows: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> NativeStep:
        """Those in some rows of a step.

        Args:
            native: Of the layers.
            rows: [num_rows] int64.
            query_start_loc, seq_lens, block_table: Of all rows, as above.
        """
        starts, query_lens = query_start_loc[rows], query_start_loc.diff()[rows]
        ends = query_lens.cumsum(0)
        tokens = torch.arange(int(ends[-1])) + torch.repeat_interleave(starts - (ends - query_lens), query_lens)
        return cls(
            native,
            tokens,
            query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
            seq_lens=seq_lens[rows],
            block_table=block_table[rows],
        )

    def attend(self, layer: Layer, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        """Write the output of one layer's new tokens.

        Args:
            layer: The layer.
            query: [num_tokens, num_heads, head_size], all of the step's.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            output: The query's shape and dtype.
        """
        window = -1 if layer.sliding_window is None else layer.sliding_window
        if window not in self._plans:
            self._plans[window] = self._native.plan(self._query_start_loc, self._seq_lens, window)
        queries = query[self.tokens]
        target = output[self.tokens] if isinstance(self.tokens, slice) else torch.empty_like(queries)
        keys, values = halves_of(kv_cache)
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=keys,
            value_cache=values,
            output=target,
            query_start_loc=self._query_start_loc,
            seq_lens=self._seq_lens,
            scale=layer.softmax_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=self._block_table,
            softcap=layer.logits_soft_cap or 0.0,
            scheduler_metadata=self._plans[window],
            s_aux=_sinks_of(layer),
        )
        if not isinstance(self.tokens, slice):
            output[self.tokens] = target


class NativeAttention:
    """What all layers of a KV cache group share."""

    def __init__(self, spec: AttentionSpec, num_heads: int) -> None:
        self._spec, self._num_heads = spec, num_heads
        is_wide = spec.block_size % _WIDE == 0 and spec.head_size % _WIDE == 0
        self._isa = "vec" if is_wide else "vec16"

    @classmethod
    def of(cls, spec: AttentionSpec, layers: Mapping[str, Any], dtype: torch.dtype) -> NativeAttention | None:
        """For a group's layers; None if vLLM has nothing for their heads.

        Args:
            spec: Their pages.
            layers: By name.
            dtype: Of the model. A cache of another one is not for vLLM's code, which takes its bytes for the model's.
        """
        if spec.dtype != dtype or spec.head_size not in CPUAttentionBackend.get_supported_head_sizes():
            return None
        num_heads = {layer.impl.num_heads for layer in layers.values()}
        return cls(spec, num_heads.pop()) if len(num_heads) == 1 else None

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """As `kernels.cpu.cache.write_kv`."""
        ops.cpu_attn_reshape_and_cache(key, value, *halves_of(kv_cache), slot_mapping, self._isa)

    def plan(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, window: int) -> torch.Tensor:
        """How the C++ code shares out sequences between threads, the same for layers of a window."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self._num_heads,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_size,
            seq_lens=seq_lens,
            dtype=self._spec.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=window,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )


def _sinks_of(layer: Layer) -> torch.Tensor | None:
    """Sinks in a dtype that vLLM's code knows."""
    sinks = layer.sinks
    return sinks if sinks is None or sinks.dtype in (torch.bfloat16, torch.float32) else sinks.float()
