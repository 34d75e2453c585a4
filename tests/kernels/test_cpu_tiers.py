"""The CPU kernels of tiers against the fp32 reference, with garbage in the copies of pages that are not full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels.cpu_case import Decoded, decode
from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.codec import TierCodec, tier_bytes
from vllm_toptheta.kernels.contract import TierLayer
from vllm_toptheta.kernels.pages import CopyViews, codes_view
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import (
    TieredResult,
    copy_keys,
    copy_values,
    dense_attention,
    gather_sequence,
    key_centre,
    tiered_attention,
)

# (num_heads, num_kv_heads, head_size)
SHAPES = {"mha": (2, 2, 64), "gqa 3": (9, 3, 64), "gqa 8": (8, 1, 80)}
LENS = [1, 16, 170, 300, 193]
WEIGHT_FLOOR, HEAVY = 3.0, 0.02
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # accumulation order differs


@dataclass
class Case:
    """Sequences with copies of their keys and values."""

    paged: PagedSequences
    query: torch.Tensor
    codes: torch.Tensor
    soft_cap: float | None
    sinks: torch.Tensor | None = None

    @property
    def head_size(self) -> int:
        return self.query.shape[-1]

    def run(self, *, weight_floor: float = WEIGHT_FLOOR, heavy: float = HEAVY, **options: Any) -> Decoded:
        return decode(
            self.query,
            self.paged,
            torch.full((self.query.shape[1],), math.log(weight_floor)),
            slope=1.0,
            log_slope=-1.0,
            codes=self.codes,
            tier_layer=tiers(self.head_size, heavy),
            logits_soft_cap=self.soft_cap,
            sinks=self.sinks,
            **{"max_dense_len": NUM_ANCHORS, **options},
        )

    def sequence(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = int(self.paged.seq_lens[row])
        return gather_sequence(self.paged.interleaved, self.paged.block_table[row], length)

    def reference(self, row: int, *, weight_floor: float = WEIGHT_FLOOR, heavy: float = HEAVY) -> TieredResult:
        return tiered_attention(
            self.query[row : row + 1],
            *self.sequence(row),
            weight_floor=weight_floor,
            heavy=heavy,
            block_size=self.paged.kv_cache.shape[2],
            softmax_scale=self.head_size**-0.5,
            logits_soft_cap=self.soft_cap,
            sinks=self.sinks,
        )


def tiers(head_size: int, heavy: float = HEAVY) -> TierLayer:
    return TierLayer(TierCodec.build(head_size), math.log(heavy) if heavy else -math.inf)


def make_case(
    shape: str,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    soft_cap: float | None = None,
    *,
    has_sinks: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(5)
    num_heads, num_kv_heads, head_size = SHAPES[shape]
    paged = PagedSequences.allocate(
        LENS,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        generator=generator,
        code_bytes=tier_bytes(head_size),
    )
    codes = codes_view(paged.kv_cache, tier_bytes(head_size))
    codes.fill_(0x7F)  # steps that are NaN
    for lens in ([0, 10, 40, 100, 192], LENS):
        before = paged.seq_lens
        paged.append(lens, generator)
        paged.write_tails(before, codes=codes, tiers=tiers(head_size))
    query = (2 * torch.randn(len(LENS), num_heads, head_size, generator=generator)).to(dtype)
    sinks = torch.linspace(-2.0, 6.0, num_heads) if has_sinks else None
    return Case(paged, query, codes, soft_cap, sinks)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block_size"), [("mha", 16), ("gqa 3", 32), ("gqa 3", 16), ("gqa 8", 128)])
def test_decode(shape: str, block_size: int, dtype: torch.dtype, soft_cap: float | None, has_sinks: bool) -> None:
    case = make_case(shape, block_size, dtype, soft_cap, has_sinks=has_sinks)
    result = case.run()
    num_kv_heads = case.paged.kv_cache.shape[1]
    for row, length in enumerate(LENS):
        if length <= NUM_ANCHORS:
            expected = dense_attention(
                case.query[row : row + 1], *case.sequence(row), softmax_scale=case.head_size**-0.5,
                logits_soft_cap=soft_cap, sinks=case.sinks,
            )  # fmt: skip
            torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
            assert result.keys_read[row].tolist() == [length] * num_kv_heads
            assert not result.copies_read[row].any()
            continue
        expected = case.reference(row)
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        torch.testing.assert_close(result.lost_mass[row : row + 1], expected.lost_mass, **TOLERANCE)
        survivors = expected.survivors[0].unflatten(0, (num_kv_heads, -1)).any(1)
        exact = expected.exact[0]
        assert result.keys_read[row].tolist() == exact.sum(1).tolist()
        assert result.copies_read[row].tolist() == (survivors & ~exact).sum(1).tolist()
        rows_read = survivors & exact
        rows_read[:, length // block_size * block_size :] = True  # the open page is read for the mean
        assert result.value_rows_read[row].tolist() == rows_read.sum(1).tolist()
    if block_size == 16:  # something is skipped, and something is light
        assert int(result.keys_read[3].max()) < 300
        assert int(result.copies_read[3].min()) > 0


@pytest.mark.parametrize("value_mean", [True, False])
@pytest.mark.parametrize("of_all_keys", [True, False])
def test_compensations(of_all_keys: bool, value_mean: bool) -> None:
    case = make_case("gqa 3")
    full = case.run()
    result = case.run(denominator_compensation=of_all_keys, value_mean=value_mean)
    torch.testing.assert_close(result.lost_mass, full.lost_mass)
    for row in (2, 3, 4):
        mean = case.sequence(row)[1].mean(0).repeat_interleave(3, dim=0)
        lost = full.lost_mass[row][:, None]
        # with the survivors' denominator, nothing is known to be lost
        expected = (full.output[row] - lost * mean) / (1.0 if of_all_keys else 1 - lost)
        if of_all_keys and value_mean:
            expected = full.output[row]
        torch.testing.assert_close(result.output[row], expected, **TOLERANCE)


def test_every_key_heavy_is_dense_attention() -> None:
    case = make_case("gqa 3")
    result = case.run(weight_floor=1e-9, heavy=0.0)
    for row, length in enumerate(LENS):
        expected = dense_attention(case.query[row : row + 1], *case.sequence(row), softmax_scale=0.125)
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        assert result.keys_read[row].tolist() == [length] * 3
    assert not result.copies_read.any()
    assert float(result.lost_mass.max()) < 1e-6


def test_a_request_moves_what_is_light_and_not_what_is_heavy() -> None:
    case = make_case("gqa 3")
    offset = torch.tensor([0.0, 0.0, math.log(0.1), -torch.inf, 0.0])
    result, plain = case.run(threshold_offset=offset), case.run()
    assert torch.equal(result.keys_read[2], plain.keys_read[2])
    assert bool((result.copies_read[2] > plain.copies_read[2]).all())
    lower = case.reference(2, weight_floor=0.1 * WEIGHT_FLOOR)
    torch.testing.assert_close(result.output[2:3], lower.output, **TOLERANCE)
    dense = dense_attention(case.query[3:4], *case.sequence(3), softmax_scale=0.125)
    torch.testing.assert_close(result.output[3:4], dense.output, **TOLERANCE)
    assert torch.equal(result.output[4], plain.output[4])


def test_copies_are_the_references_however_the_tokens_came() -> None:
    case = make_case("gqa 3", dtype=torch.bfloat16)
    views = CopyViews.of(case.codes, 64)
    table = case.paged.block_table.long()
    for row, length in enumerate(LENS):
        num_full = length // 16
        if not num_full:
            continue
        key, value = (rows[: num_full * 16] for rows in case.sequence(row))
        keys, values = copy_keys(key, key_centre(key)), copy_values(value)
        blocks = table[row, :num_full]

        def stored(view: torch.Tensor, blocks: torch.Tensor = blocks) -> torch.Tensor:
            return view[blocks].transpose(1, 2).flatten(0, 1)

        lower, upper = keys.codes.chunk(2, dim=-1)
        assert float((stored(views.key_codes) != lower | upper << 4).float().mean()) < 1e-3
        quarters = values.codes.chunk(4, dim=-1)
        packed = sum(quarter << 2 * index for index, quarter in enumerate(quarters))
        assert float((stored(views.value_codes) != packed).float().mean()) < 1e-3
        torch.testing.assert_close(stored(views.key_step), keys.step, rtol=2e-3, atol=0)
        torch.testing.assert_close(stored(views.value_step), values.step, rtol=2e-3, atol=0)
    assert bool((case.codes[table[2, 10]] == 0x7F).all())  # an open page
    written = case.codes.clone()
    case.paged.write_tails(torch.zeros(len(LENS), dtype=torch.int64), codes=case.codes, tiers=tiers(64))
    assert torch.equal(case.codes, written)
