"""Tiers made ready to attend: copies that all blocks of a layer's rows share, and a count of what is read."""

from dataclasses import dataclass

import torch

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.reference import (
    AttentionResult,
    KeyCopies,
    TieredResult,
    ValueCopies,
    copy_keys,
    copy_values,
    group_counts,
    key_centre,
    tiered_attention,
)

__all__ = ["Copies", "Tiers"]

# tokens of a page of vLLM's cache: those in the newest one have no copies yet
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Copies:
    """Copies of the first tokens of a sequence.

    Attributes:
        keys: of its keys.
        values: of its values, as many.
    """

    keys: KeyCopies
    values: ValueCopies

    def first(self, num_tokens: int) -> "Copies":
        """Returns those of fewer tokens: each has its own, and the centre is of tokens that all rows see."""
        keys, values = self.keys, self.values
        return Copies(
            KeyCopies(keys.codes[:num_tokens], keys.step[:num_tokens], keys.centre),
            ValueCopies(values.codes[:num_tokens], values.step[:num_tokens]),
        )


class Tiers:
    """Attention by tiers, as `reference.tiered_attention` has it.

    Args:
        weight_floor: in multiples of the average weight, above 0.
        heavy: what a key must weigh at least to be read exactly, in multiples of what the row's anchors weigh.
    """

    def __init__(self, *, weight_floor: float, heavy: float) -> None:
        self._weight_floor = weight_floor
        self._heavy = heavy

    def copy(self, call: AttentionCall) -> Copies:
        """Returns copies of what a call sees.

        Args:
            call: of any rows of the sequence.
        """
        return Copies(copy_keys(call.key, key_centre(call.key)), copy_values(call.value))

    def attend(self, call: AttentionCall, copies: Copies | None = None) -> AttentionResult:
        """Returns the attention of some rows.

        Args:
            call: of rows that see more keys than anchors.
            copies: of the keys and values of their sequence, those of the call first; None to make them now.
        """
        copies = self.copy(call) if copies is None else copies.first(len(call.key))
        tiered = tiered_attention(
            call.query,
            call.key,
            call.value,
            weight_floor=self._weight_floor,
            heavy=self._heavy,
            block_size=_BLOCK_SIZE,
            softmax_scale=call.softmax_scale,
            logits_soft_cap=call.soft_cap,
            keys=copies.keys,
            values=copies.values,
            sinks=call.sinks,
        )
        return _counted(tiered)


def _counted(tiered: TieredResult) -> AttentionResult:
    """The result as that of other attention: how many keys and values are read, exactly and as copies."""
    num_rows, num_heads, _ = tiered.survivors.shape
    num_kv_heads = tiered.exact.shape[1]
    is_exact = tiered.exact.repeat_interleave(num_heads // num_kv_heads, dim=1)
    return AttentionResult(
        output=tiered.output,
        num_survivors=tiered.survivors.sum(dim=-1),
        value_rows_read=group_counts(tiered.survivors & is_exact, num_kv_heads),
        keys_read=tiered.exact.sum(dim=-1),
        lost_mass=tiered.lost_mass,
        true_lost_mass=tiered.true_lost_mass,
        thresholded=torch.ones(num_rows, dtype=torch.bool, device=tiered.output.device),
        survivors=tiered.survivors,
        copies_read=group_counts(tiered.survivors & ~is_exact, num_kv_heads),
    )
