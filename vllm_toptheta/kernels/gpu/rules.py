"""What each sequence of a step is decoded by, where sequences differ: the `rules` of `decode.decode`.

A rule is four int32: the level, which says whose coefficients apply; the length up to which the sequence keeps every
key; and the two lengths between which its thresholds follow its own. Level 0 is the common one, and only its sequences
enter the statistics of what was lost. Without rules, all sequences are at level 0 and have the same lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

RULE_FIELDS = 4  # level, dense length, shortest and longest calibrated length
_FIELDS = tl.constexpr(RULE_FIELDS)


@triton.jit
def level_of(rules_ptr, seq, num_seqs):
    """Levels of sequences, a scalar or a tensor like `seq`; 0 behind the last one."""
    if rules_ptr is None:
        return tl.zeros_like(seq)
    else:
        return tl.load(rules_ptr + seq * _FIELDS, mask=seq < num_seqs, other=0)


@triton.jit
def dense_length_of(rules_ptr, seq, num_seqs, min_sparse_context):
    """Lengths up to which sequences keep every key, a scalar or a tensor like `seq`."""
    if rules_ptr is None:
        return min_sparse_context
    else:
        return tl.load(rules_ptr + seq * _FIELDS + 1, mask=seq < num_seqs, other=0)


@triton.jit
def curve_of(rules_ptr, seq, coefficients_ptr, level_stride, min_length, max_length):
    """The coefficients of a sequence's level, and the lengths between which they apply."""
    if rules_ptr is None:
        return coefficients_ptr, min_length, max_length
    else:
        rule = rules_ptr + seq * _FIELDS
        return coefficients_ptr + tl.load(rule) * level_stride, tl.load(rule + 2), tl.load(rule + 3)
