"""How a decode step is shared out among programs, decided on the device.

The grid of a captured CUDA graph is fixed, the lengths are not. So every kv head gets a fixed number of programs, and
each works out its own share from `seq_lens`: the keys of all sequences are laid end to end, in units of a few tokens,
and program p takes the work from p * share to (p + 1) * share, wherever sequences begin and end in there. A unit of a
sequence that keeps everything is twice the work of another, because its values are read as well.

What a program does for one sequence is a piece; sequence s and program p share piece number p + s, which is unique,
because going through the work in order increases one of the two at every step.
"""

import triton
import triton.language as tl

from vllm_toptheta.kernels.rules import dense_length_of


@triton.jit
def work_of_step(
    seq_lens_ptr,  # [num_seqs] int32
    rules_ptr,  # [num_seqs, RULE_FIELDS] int32, or None
    num_seqs,
    min_sparse_context,
    num_programs,
    UNIT: tl.constexpr,
    MIN_WORK: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
):
    """Return the work of every sequence, [SEQ_BLOCK] int32, and a program's share of the whole."""
    index = tl.arange(0, SEQ_BLOCK)
    seq_lens = tl.load(seq_lens_ptr + index, mask=index < num_seqs, other=0)
    dense_lengths = dense_length_of(rules_ptr, index, num_seqs, min_sparse_context)
    work = tl.cdiv(seq_lens, UNIT) * tl.where(seq_lens <= dense_lengths, 2, 1)
    return work, tl.maximum(tl.cdiv(tl.sum(work, axis=0), num_programs), MIN_WORK)


@triton.jit
def units_of_piece(program, share, work_before, seq_len, is_dense, UNIT: tl.constexpr):
    """Return the first unit of a sequence that is a program's, and the one behind its last.

    Args:
        program: Programs, a scalar or a tensor.
        share: Work of a program.
        work_before: Work of all sequences before this one.
        seq_len: Tokens of the sequence.
        is_dense: Whether it keeps everything.
    """
    weight = tl.where(is_dense, 2, 1)
    num_units = tl.cdiv(seq_len, UNIT)
    # units begin at multiples of their weight: rounding both ends up leaves none out and none twice
    first = tl.cdiv(tl.maximum(program * share - work_before, 0), weight)
    last = tl.cdiv(tl.maximum((program + 1) * share - work_before, 0), weight)
    return tl.minimum(first, num_units), tl.minimum(last, num_units)
