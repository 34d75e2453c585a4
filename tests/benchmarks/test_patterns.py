"""Patterns of survivors: how many there are and where, files of them, and that the kernel reads what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_toptheta.benchmarks.patterns import (
    CLUSTER_TOKENS,
    RULES,
    SKEW,
    Batch,
    Drawn,
    PatternInfo,
    Recorded,
    Spread,
    pattern_of,
)
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.limits import NUM_FIRST_ANCHORS

RESULTS = Path(__file__).parents[2] / "docs" / "results"
BATCH = Batch((4096, 3000, 4096, 700), num_kv_heads=4, group=3)


def recorded(lengths: tuple[int, ...] = (400, 416), *, num_layers: int = 2) -> Recorded:
    """A pattern of four query heads on two kv heads; half of the rows keep their last key."""
    generator = np.random.default_rng(0)
    info = PatternInfo(
        model="tiny",
        text=("a.txt",),
        weight_floor=2,
        layers=tuple(range(num_layers)),
        row_lengths=lengths,
        num_heads=4,
        num_kv_heads=2,
        rows_read_share=0.1,
    )
    kept = tuple(
        tuple(
            tuple(np.sort(generator.choice(length, 30, replace=False)).astype(np.int64) for _ in range(4))
            for length in lengths
        )
        for _ in range(num_layers)
    )
    return Recorded(info, kept)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_draws_as_many_as_it_says(rule: str) -> None:
    found = Drawn(rule, 128).survivors(0, BATCH)
    assert [kept.shape for kept in found] == [(4, 3, length) for length in BATCH.lens]
    counts = torch.stack([kept.sum(dim=2) for kept in found]).float()
    if rule in ("even", "clustered"):
        assert (counts == 128).all()
    elif rule == "skewed-by-head":
        assert counts[0, 3, 0] / counts[0, 0, 0] == pytest.approx(SKEW, rel=0.1)
        assert counts.mean() == pytest.approx(128, rel=0.02)
    else:
        # the last sequence would keep more than it has
        assert (counts[3] > 300).all()
        assert counts[2].mean() / counts[0].mean() == pytest.approx(SKEW ** (2 / 3), rel=0.1)
    again = Drawn(rule, 128).survivors(0, BATCH)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_even_ones_are_even_and_clusters_are_those_of_real_text() -> None:
    batch = Batch((32768,) * 8, num_kv_heads=8, group=2)
    even, clustered = (
        torch.cat([kept.view(-1, 32768) for kept in Drawn(rule, 1024).survivors(0, batch)])
        for rule in ("even", "clustered")
    )
    distances = torch.cat([head.nonzero().flatten().diff() for head in even])
    assert (distances == 32).all()
    fullest = clustered.view(len(clustered), -1, CLUSTER_TOKENS).sum(dim=2).amax(dim=1) / (1024 / 32)
    assert 6 < fullest.mean() < 11
    # heads of a group share their clusters
    of_groups = clustered.view(-1, 2, 32, CLUSTER_TOKENS).sum(dim=3).float()
    pairs = [np.corrcoef(group.numpy())[0, 1] for group in of_groups]
    assert np.mean(pairs) > 0.9


@pytest.mark.parametrize("pattern", [Drawn("clustered", 100), Drawn("skewed-by-head", 100), recorded()])
def test_spread_reads_as_many_rows(pattern: Drawn | Recorded) -> None:
    spread = Spread(pattern)
    assert spread.num_layers == pattern.num_layers
    for layer in range(pattern.num_layers):
        of_pattern, of_spread = (
            torch.tensor([int(kept.any(dim=1).sum()) for kept in one.survivors(layer, BATCH)])
            for one in (pattern, spread)
        )
        assert of_spread.sum() == pytest.approx(int(of_pattern.sum()), rel=0.02)
        for kept in spread.survivors(layer, BATCH):
            assert (kept == kept[:, :1]).all()
            counts = kept[:, 0].sum(dim=1)
            assert (counts == counts[0]).all()


def test_a_recording_is_replayed_as_it_was() -> None:
    pattern = recorded()
    (first, second) = pattern.survivors(1, Batch((400, 416), num_kv_heads=2, group=2))
    for row, found in enumerate((first, second)):
        heads = found.view(4, -1)
        assert [head.nonzero().flatten().tolist() for head in heads] == [kept.tolist() for kept in pattern.kept[1][row]]
    # more kv heads than recorded: the next row takes its turn; larger groups take from it, too
    (wide,) = pattern.survivors(0, Batch((400,), num_kv_heads=4, group=3))
    assert wide.shape == (4, 3, 400)
    assert wide[0, 0].nonzero().flatten().tolist() == pattern.kept[0][0][0].tolist()
    assert torch.equal(wide[2, 2], wide[0, 0])
    assert torch.equal(wide[0, 2], wide[2, 0])


def test_other_lengths_repeat_or_cut_what_lies_far_back() -> None:
    pattern = recorded((400,), num_layers=1)
    same, longer, shorter = (
        pattern.survivors(0, Batch((length,), num_kv_heads=2, group=2))[0] for length in (400, 1000, 300)
    )
    head = NUM_FIRST_ANCHORS
    for other in (longer, shorter):
        assert torch.equal(other[..., :head], same[..., :head])
        assert torch.equal(other[..., -(300 - head) :], same[..., -(300 - head) :])
    repeated = same[..., head:]
    assert torch.equal(longer[..., -2 * (400 - head) : -(400 - head)], repeated)


# beside other tests it is slow
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(near=st.sets(st.integers(0, 5000), max_size=60), far=st.sets(st.integers(0, 70_000), max_size=3))
def test_files_keep_every_position(near: set[int], far: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    one = recorded((70_001,), num_layers=1)
    heads = tuple(np.array(sorted(kept), np.int64) for kept in (near, far, near | far, set()))
    pattern = Recorded(one.info, ((heads,),))
    file = tmp_path_factory.mktemp("patterns") / "deep" / "pattern.safetensors"
    pattern.save(file)
    loaded = Recorded.load(file)
    assert loaded.info == pattern.info
    for kept, expected in zip(loaded.kept[0][0], heads, strict=True):
        assert kept.tolist() == expected.tolist()


def test_what_is_no_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no such pattern.*even, clustered"):
        pattern_of(str(tmp_path / "none"), target_k=8)
    (tmp_path / "text").write_text("{}")
    with pytest.raises(BenchmarkError, match="text: no recorded pattern"):
        pattern_of(str(tmp_path / "text"), target_k=8)
    pattern = recorded()
    shorter = pattern.info.model_copy(update={"row_lengths": (20, 20)})
    Recorded(shorter, pattern.kept).save(tmp_path / "short.safetensors")
    with pytest.raises(BenchmarkError, match="behind the row"):
        Recorded.load(tmp_path / "short.safetensors")
    one_row = pattern.info.model_copy(update={"row_lengths": (400,)})
    Recorded(one_row, pattern.kept).save(tmp_path / "rows.safetensors")
    with pytest.raises(BenchmarkError, match="sizes do not fit"):
        Recorded.load(tmp_path / "rows.safetensors")
    with pytest.raises(BenchmarkError, match="cannot be written"):
        pattern.save(tmp_path / "text" / "pattern.safetensors")
    assert pattern_of("even", target_k=8) == Drawn("even", 8)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("pattern-*.safetensors")), ids=lambda file: file.name)
def test_the_patterns_of_the_documents_are_whole(file: Path) -> None:
    pattern = Recorded.load(file)
    info = pattern.info
    # a batch of the model's own shape holds each recorded row once
    batch = Batch(info.row_lengths, info.num_kv_heads, info.num_heads // info.num_kv_heads)
    read = sum(
        int(kept.any(dim=1).sum()) for layer in range(pattern.num_layers) for kept in pattern.survivors(layer, batch)
    )
    cached = pattern.num_layers * info.num_kv_heads * sum(info.row_lengths)
    assert read / cached == pytest.approx(info.rows_read_share)


def test_there_are_patterns_in_the_documents() -> None:
    assert len(list(RESULTS.glob("pattern-*.safetensors"))) == 3
