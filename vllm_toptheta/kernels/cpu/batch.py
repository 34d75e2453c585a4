"""What CPUs work out once a step, for all layers: where the tokens stand, and how a sequence is decoded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_toptheta.kernels.contract import DecodeStep, TailStep
from vllm_toptheta.kernels.cpu.cache import NULL_BLOCK
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of a decode step; hashed by what it is, so that arrays of it can be kept.

    Attributes:
        seq_lens: [num_seqs] int64, cached tokens including the new one; at least 1.
        blocks: [num_seqs, max_blocks] int64, physical blocks; `NULL_BLOCK` behind a sequence's end.
        block_size: Tokens of a page.
        min_len: Length of the shortest sequence.
        last_full: [num_seqs] int64, physical block of the last full page; meaningless where there is none.
        has_full: [num_seqs] bool, whether there is one.
        offsets: [num_seqs] float32, what is added to thresholds.
        is_dense: [num_seqs, 1] bool, sequences that keep every key.
        keeps_everything: Whether all of them do.
        log_lengths: [num_seqs] float32, ln n, clamped to the calibrated lengths.
        is_counted: [num_seqs, 1] int64, 1 where the server's own thresholds apply.
        totals: [5] int64, what the step adds to `Counters.totals`.
    """

    seq_lens: torch.Tensor
    blocks: torch.Tensor
    block_size: int
    min_len: int
    last_full: torch.Tensor
    has_full: torch.Tensor
    offsets: torch.Tensor
    is_dense: torch.Tensor
    keeps_everything: bool
    log_lengths: torch.Tensor
    is_counted: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def of_step(cls, step: DecodeStep, block_size: int) -> Batch:
        """Work it out; sequences have at least one token, one of which is new.

        Raises:
            ValueError: More are new.
        """
        if step.max_query_len != 1:
            raise ValueError(f"max_query_len: {step.max_query_len}, expected 1 on CPUs")
        seq_lens = step.seq_lens.long()
        num_blocks = -(-seq_lens // block_size)
        index = torch.arange(int(num_blocks.max()))
        blocks = step.block_table[:, : len(index)].long().where(index < num_blocks[:, None], NULL_BLOCK)
        num_full = seq_lens // block_size
        offsets = (
            torch.zeros(len(seq_lens)) if step.threshold_offset is None else step.threshold_offset[: len(seq_lens)]
        )
        is_small = int(seq_lens.sum()) < step.min_step_tokens
        is_dense = (seq_lens <= step.max_dense_len) | (offsets == -torch.inf) | is_small
        is_common = offsets == 0
        totals = (
            len(seq_lens),
            int((is_dense & is_common).sum()),
            int(seq_lens.sum()),
            1,
            int((~is_common).sum()),
        )
        return cls(
            seq_lens=seq_lens,
            blocks=blocks,
            block_size=block_size,
            min_len=int(seq_lens.min()),
            last_full=blocks.gather(1, (num_full - 1).clamp(min=0)[:, None]).flatten(),
            has_full=num_full > 0,
            offsets=offsets,
            is_dense=is_dense[:, None],
            keeps_everything=bool(is_dense.all()),
            log_lengths=seq_lens.clamp(*step.length_range).float().log(),
            is_counted=(~is_dense & is_common).long()[:, None],
            totals=torch.tensor(totals),
        )

    # what torch operations need, and compiled code does not

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        """[num_seqs, max_len] bool, positions that hold a token; max_len = max_blocks * block_size."""
        return self._position < self.seq_lens[:, None]

    @functools.cached_property
    def is_open(self) -> torch.Tensor:
        """[num_seqs, max_len] bool, tokens of the last page where that is not full."""
        return self.visible & (self._position >= (self.seq_lens // self.block_size * self.block_size)[:, None])

    @functools.cached_property
    def anchors(self) -> torch.Tensor:
        """[num_seqs, NUM_ANCHORS] int64, positions of the anchors; of shorter sequences any of theirs."""
        last = self.seq_lens[:, None] - NUM_LAST_ANCHORS + torch.arange(NUM_LAST_ANCHORS)
        first = torch.arange(NUM_FIRST_ANCHORS).minimum(self.seq_lens[:, None] - 1)
        return torch.cat([first, last.clamp(min=0)], dim=1)

    @property
    def _position(self) -> torch.Tensor:
        return torch.arange(self.blocks.shape[1] * self.block_size)

    def within(self, sliding_window: int) -> torch.Tensor:
        """[num_seqs, max_len] bool: positions among a sequence's last `sliding_window` tokens, or behind its end."""
        return torch.arange(self.visible.shape[1]) >= (self.seq_lens - sliding_window)[:, None]


@dataclass(frozen=True)
class ClosedPages:
    """Pages whose tails a step writes, mostly those that become full; a row for each sequence that has any.

    Attributes:
        blocks: [num_rows, max_pages] int64, physical blocks in the sequence's order, `NULL_BLOCK` where padded.
        valid: [num_rows, max_pages] bool, False where padded.
        previous: [num_rows] int64, the block before the first of the row; meaningless for a sequence's first block.
        is_first: [num_rows] bool, the row starts with a sequence's first block.
        sequence_start: [num_rows] int64, that block.
    """

    blocks: torch.Tensor
    valid: torch.Tensor
    previous: torch.Tensor
    is_first: torch.Tensor
    sequence_start: torch.Tensor

    @classmethod
    def of_step(cls, step: TailStep, block_size: int, whole_rows: Sequence[int] = ()) -> ClosedPages | None:
        """The pages that fill up, and of some rows all full ones; None if there is none."""
        seq_lens = step.seq_lens.long()
        first, end = (seq_lens - step.query_start_loc.long().diff()) // block_size, seq_lens // block_size
        first[list(whole_rows)] = 0
        rows = torch.nonzero(end > first).flatten()
        if not len(rows):
            return None
        first, end = first[rows], end[rows]
        page = first[:, None] + torch.arange(int((end - first).max()))
        valid = page < end[:, None]
        table = step.block_table[rows].long()
        return cls(
            blocks=table.gather(1, page.clamp(max=table.shape[1] - 1)).where(valid, NULL_BLOCK),
            valid=valid,
            previous=table.gather(1, (first - 1).clamp(min=0)[:, None]).flatten(),
            is_first=first == 0,
            sequence_start=table[:, 0],
        )


def prepare_decode(step: DecodeStep, block_size: int) -> DecodeStep:
    """The step with what all layers need of it."""
    return step._replace(prepared=Batch.of_step(step, block_size))


def prepare_tails(step: TailStep, block_size: int, whole_rows: Sequence[int] = ()) -> TailStep:
    """The step with what all layers need of it.

    Args:
        step: All sequences of the step.
        block_size: Tokens of a page.
        whole_rows: Sequences whose tails are written from their first page on, because nobody may have written them.
    """
    return step._replace(prepared=ClosedPages.of_step(step, block_size, whole_rows))
