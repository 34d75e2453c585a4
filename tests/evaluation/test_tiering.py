from typing import Any

import pytest
import torch

from tests.calibration.tiny_model import NUM_LAYERS, random_tokens
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import Variant, tiering, window
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.window import read_prefix, read_window
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import AttentionResult, TieredResult, tiered_attention

LENGTH, WINDOW = 400, 40
VARIANT = Variant(method="tiers", target="floor:0.5", heavy=0.003)


def read(model: Any) -> list[tuple[AttentionCall, AttentionResult]]:
    """The blocks of a window, of a few rows each, and what tiers made of them."""
    token_ids, blocks = random_tokens(LENGTH), list[tuple[AttentionCall, AttentionResult]]()
    read_window(
        model,
        read_prefix(model, token_ids[:-WINDOW]),
        token_ids[-WINDOW:],
        SparseAttention(VARIANT, max_length=LENGTH),
        observe=lambda call, result: blocks.append((call, result)),
    )
    return blocks


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_BLOCK_BYTES", 15 * 4 * 4 * LENGTH)


def row_of(call: AttentionCall, row: int) -> TieredResult:
    """A row as a decode step of its length, which knows no later token."""
    seen = call.num_before + row + 1
    return tiered_attention(
        call.query[row : row + 1],
        call.key[:seen],
        call.value[:seen],
        weight_floor=0.5,
        heavy=0.003,
        block_size=16,
        softmax_scale=call.softmax_scale,
        logits_soft_cap=call.soft_cap,
    )


def test_rows_are_those_of_the_reference_and_what_they_read_is_counted(model: Any) -> None:
    blocks = read(model)
    assert [call.layer_idx for call, _ in blocks] == sorted(3 * list(range(NUM_LAYERS)))
    num_heavy = num_light = 0
    for call, result in blocks:
        for row in range(len(call.query)):
            expected = row_of(call, row)
            torch.testing.assert_close(result.output[row], expected.output[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result.lost_mass[row], expected.lost_mass[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(result.true_lost_mass[row], expected.true_lost_mass[0], rtol=1e-4, atol=1e-6)
            survivors, exact = expected.survivors[0], expected.exact[0]
            assert result.num_survivors[row].tolist() == survivors.sum(dim=1).tolist()
            assert torch.equal(result.survivors[row, :, : survivors.shape[1]], survivors)
            for group, heads in enumerate(((0, 1), (2, 3))):
                kept = {key for head in heads for key in survivors[head].nonzero().flatten().tolist()}
                read_exactly = set(exact[group].nonzero().flatten().tolist())
                assert int(result.keys_read[row, group]) == len(read_exactly)
                assert int(result.value_rows_read[row, group]) == len(kept & read_exactly)
                assert int(result.copies_read[row, group]) == len(kept - read_exactly)
                num_heavy += len(read_exactly) - NUM_ANCHORS
                num_light += len(kept - read_exactly)
    assert num_heavy > 0
    assert num_light > 0


def test_blocks_of_a_layer_share_its_copies(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = list[int]()

    def copy_values(value: torch.Tensor) -> Any:
        copied.append(len(value))
        return original(value)

    original = tiering.copy_values
    monkeypatch.setattr(tiering, "copy_values", copy_values)
    assert len(read(model)) == 3 * NUM_LAYERS
    assert copied == [LENGTH] * NUM_LAYERS


def test_a_phase_cannot_be_had() -> None:
    with pytest.raises(EvaluationError, match="phase: tiers are of every row, not of phase decode alone"):
        SparseAttention(VARIANT, max_length=LENGTH, phase="decode")
