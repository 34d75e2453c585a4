from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration.families import HYBRIDS, family_config
from tests.calibration.tiny_model import random_tokens, tiny_config, tiny_model
from tests.evaluation.test_decoding import sliding_model
from vllm_toptheta.calibration.model import attending, hidden_states
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import Variant, decoding, window
from vllm_toptheta.evaluation.decoding import Lane, read_prompt
from vllm_toptheta.evaluation.losses import next_token_logits
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.window import read_prefix, read_window
from vllm_toptheta.evaluation.window_reads import EqualRows, WindowRecorder
from vllm_toptheta.reference import top_k_attention
from vllm_toptheta.store import ThresholdStore

LENGTH, WINDOW = 240, 48
PREFIX = LENGTH - WINDOW


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes are read in several parts, and windows in blocks of 6 rows."""
    monkeypatch.setattr(window, "PREFIX_ROWS", 80)
    monkeypatch.setattr(window, "_BLOCK_BYTES", 6 * 4 * 4 * LENGTH)


def step_by_step(model: Any, token_ids: Tensor, attention: SparseAttention | None) -> Tensor:
    """The logits of a window whose tokens are decoded one at a time."""
    lane = Lane(read_prompt(model, token_ids[:PREFIX]), attention)
    cache = decoding._joined_cache([lane.prompt.cache])
    with attending(model, decoding._ATTENTION_NAME, decoding._active_lanes, [lane]):
        return torch.cat([decoding._next_logits(model, token[None, None], cache) for token in token_ids[PREFIX:]])


def at_once(model: Any, token_ids: Tensor, attention: SparseAttention | None) -> Tensor:
    cache = read_prefix(model, token_ids[:PREFIX])
    return next_token_logits(model, read_window(model, cache, token_ids[PREFIX:], attention))


@pytest.mark.parametrize(
    "variant",
    [
        None,
        Variant(target="floor:3"),
        Variant(target="floor:0.5", compensation="none"),
        Variant(method="top_k", target="k:8"),
        Variant(target="k:8"),
        Variant(method="shadow", target="floor:3", compensation="candidates+vmc"),
        Variant(method="tiers", target="floor:2", heavy=0.02),
    ],
    ids=lambda variant: "dense" if variant is None else variant.name,
)
def test_a_window_equals_its_tokens_one_at_a_time(model: Any, store: ThresholdStore, variant: Variant | None) -> None:
    token_ids = random_tokens(LENGTH)
    needs_store = variant is not None and (variant.weight_floor is None or variant.method == "shadow")
    attention = variant and SparseAttention(variant, store if needs_store else None, max_length=LENGTH)
    expected = step_by_step(model, token_ids, attention)
    torch.testing.assert_close(at_once(model, token_ids, attention), expected, rtol=1e-3, atol=2e-3)
    change = float((expected - step_by_step(model, token_ids, None)).abs().max())
    assert change > 0.1 if variant else change == 0


@pytest.mark.parametrize("variant", [None, Variant(target="floor:3", dense_layers=(1,))], ids=["dense", "floor"])
def test_windows_know_sliding_windows_and_soft_caps(variant: Variant | None) -> None:
    model, token_ids = sliding_model(), random_tokens(LENGTH)
    attention = variant and SparseAttention(variant, max_length=LENGTH)
    expected = step_by_step(model, token_ids, attention)
    torch.testing.assert_close(at_once(model, token_ids, attention), expected, rtol=1e-3, atol=1e-3)
    assert float((expected - step_by_step(model, token_ids, None)).abs().max()) > (0.01 if variant else -1)


@pytest.mark.parametrize("family", ["granite_swa", "gpt_oss", "gemma3n", "gemma4"])
@pytest.mark.parametrize(
    "variant",
    [
        None,
        Variant(target="floor:3"),
        Variant(method="top_k", target="k:8"),
        Variant(method="tiers", target="floor:2", heavy=0.02),
    ],
    ids=lambda variant: "dense" if variant is None else variant.name,
)
def test_windows_know_attention_sinks_and_shared_keys(family: str, variant: Variant | None) -> None:
    model, token_ids = tiny_model(family_config(family)), random_tokens(LENGTH)
    attention = variant and SparseAttention(variant, max_length=LENGTH)
    expected = step_by_step(model, token_ids, attention)
    torch.testing.assert_close(at_once(model, token_ids, attention), expected, rtol=1e-3, atol=1e-3)
    if variant is None:
        model.set_attn_implementation("eager")
        own = next_token_logits(model, hidden_states(model, token_ids)[PREFIX:])
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    else:
        assert float((expected - step_by_step(model, token_ids, None)).abs().max()) > 0.01


def test_a_prefix_can_be_continued_any_number_of_times(model: Any) -> None:
    token_ids, attention = random_tokens(LENGTH), SparseAttention(Variant(target="floor:3"), max_length=LENGTH)
    cache = read_prefix(model, token_ids[:PREFIX])
    sparse = read_window(model, cache, token_ids[PREFIX:], attention)
    dense = read_window(model, cache, token_ids[PREFIX:])
    assert torch.equal(read_window(model, cache, token_ids[PREFIX:], attention), sparse)
    assert not torch.equal(dense, sparse)
    torch.testing.assert_close(dense, hidden_states(model, token_ids)[PREFIX:], rtol=1e-3, atol=1e-3)


def test_what_is_recorded_is_what_is_read(model: Any) -> None:
    token_ids, recorder = random_tokens(LENGTH), WindowRecorder()
    attention = SparseAttention(Variant(target="floor:3", dense_layers=(2,)), max_length=LENGTH)
    read_window(model, read_prefix(model, token_ids[:PREFIX]), token_ids[PREFIX:], attention, observe=recorder)
    reads = recorder.reads(range(PREFIX + 1, LENGTH + 1))
    assert (reads.layers.tolist(), reads.sparse_layers.tolist()) == ([0, 1, 2, 3], [0, 1, 3])
    assert reads.value_rows.shape == (4, WINDOW, 2)
    assert reads.survivors.shape == reads.lost_mass.shape == (3, WINDOW, 4)
    assert (reads.value_rows[2] == reads.row_lengths[:, None]).all()
    of_groups = reads.survivors.reshape(3, WINDOW, 2, 2)
    sparse_rows = reads.value_rows[[0, 1, 3]]
    assert (reads.keys == reads.row_lengths[:, None]).all()
    assert not reads.copies.any()
    assert (of_groups.max(axis=-1) <= sparse_rows).all()
    assert (sparse_rows <= of_groups.sum(axis=-1)).all()
    assert sparse_rows.sum() < np.tile(reads.row_lengths, 6).sum()
    assert ((reads.lost_mass > 0) == (reads.survivors < reads.row_lengths[:, None])).all()


def test_exact_keys_and_copies_are_recorded(model: Any) -> None:
    token_ids, recorder, read = random_tokens(LENGTH), WindowRecorder(), dict[int, list[Any]]()
    variant = Variant(method="tiers", target="floor:2", heavy=0.02, dense_layers=(2,))

    def observe(call: Any, result: Any) -> None:
        recorder(call, result)
        read.setdefault(call.layer_idx, []).append(result)

    cache = read_prefix(model, token_ids[:PREFIX])
    read_window(model, cache, token_ids[PREFIX:], SparseAttention(variant, max_length=LENGTH), observe=observe)
    reads = recorder.reads(range(PREFIX + 1, LENGTH + 1))
    assert reads.keys.shape == reads.copies.shape == (4, WINDOW, 2)
    assert (reads.keys[2] == reads.row_lengths[:, None]).all()
    assert not reads.copies[2].any()
    for layer in (0, 1, 3):
        assert reads.keys[layer].sum() == sum(int(result.keys_read.sum()) for result in read[layer])
        assert reads.copies[layer].sum() == sum(int(result.copies_read.sum()) for result in read[layer]) > 0


def test_equal_rows_are_the_least_k_that_reads_as_many() -> None:
    # with one layer, sparse rows see the queries of dense ones; and 16 rows are all sampled
    model, token_ids = tiny_model(tiny_config(num_hidden_layers=1)), random_tokens(LENGTH)
    attention = SparseAttention(Variant(target="floor:2"), max_length=LENGTH)
    finder, recorder, read = EqualRows(attention, max_length=LENGTH), WindowRecorder(), dict[int, int]()
    cache = read_prefix(model, token_ids[:-16])

    def observe(call: Any, result: Any) -> None:
        finder(call, result)
        for k in range(8, LENGTH, 8):
            top_k = top_k_attention(call.query, call.key, call.value, target_k=k, softmax_scale=call.softmax_scale)
            read[k] = int(top_k.value_rows_read.sum())

    read_window(model, cache, token_ids[-16:], observe=observe)
    read_window(model, cache, token_ids[-16:], attention, observe=recorder)
    rows_read = int(recorder.reads(range(LENGTH - 15, LENGTH + 1)).value_rows.sum())
    assert finder.target_k == min(k for k in read if read[k] >= rows_read)
    assert finder.target_k > 8


def test_rows_that_are_too_long_are_refused(model: Any) -> None:
    token_ids = random_tokens(LENGTH)
    cache = read_prefix(model, token_ids[:PREFIX])
    with pytest.raises(EvaluationError, match=rf"a row of \d+ keys, made for {PREFIX}"):
        read_window(model, cache, token_ids[PREFIX:], SparseAttention(Variant(target="floor:3"), max_length=PREFIX))
    assert model.config._attn_implementation != window._ATTENTION_NAME


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_are_not_shared_by_windows(family: str) -> None:
    model, token_ids = tiny_model(family_config(family)), random_tokens(40)
    for read in (read_prefix, read_prompt):
        with pytest.raises(EvaluationError, match=f"model_type {family}: decoding is not evaluated where layers keep"):
            read(model, token_ids)
