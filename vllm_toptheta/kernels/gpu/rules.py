"""The `rules` of a step (`kernels.contract`), on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import RULE_FIELDS

_FIELDS = tl.constexpr(RULE_FIELDS)


@triton.jit
def level_of(rules_ptr, seq, num_seqs):
    """Levels of sequences, a scalar or a tensor like `seq`; 0 behind the last one."""
    if rules_ptr is None:
        return tl.zeros_like(seq)
    else:
        return tl.load(rules_ptr + seq * _FIELDS, mask=seq < num_seqs, other=0)


@triton.jit
def max_dense_len_of(rules_ptr, seq, num_seqs, max_dense_len):
    """Lengths up to which sequences keep every key, a scalar or a tensor like `seq`."""
    if rules_ptr is None:
        return max_dense_len
    else:
        return tl.load(rules_ptr + seq * _FIELDS + 1, mask=seq < num_seqs, other=0)


@triton.jit
def lengths_of(rules_ptr, seq, min_length, max_length):
    """The lengths between which a sequence's thresholds follow its own."""
    if rules_ptr is None:
        return min_length, max_length
    else:
        rule = rules_ptr + seq * _FIELDS
        return tl.load(rule + 2), tl.load(rule + 3)
