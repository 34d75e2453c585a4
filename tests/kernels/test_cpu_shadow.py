"""The CPU kernels of shadow keys against the fp32 reference, with garbage in the codes of pages that are not full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels.cpu_case import Decoded, decode
from tests.kernels.gaps import in_a_gap
from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.codec import ShadowCodec
from vllm_toptheta.kernels.contract import ShadowLayer
from vllm_toptheta.kernels.pages import codes_view
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import (
    Compensation,
    KeyProjection,
    candidate_keys,
    causal_scores,
    dense_attention,
    encode_keys,
    fit_projection,
    gather_sequence,
    pack_codes,
    quantize_query,
    shadow_scores,
    top_theta_attention,
)

# (num_heads, num_kv_heads, head_size, num_channels)
SHAPES = {"mha": (2, 2, 64, 32), "gqa 3": (9, 3, 64, 64), "gqa 8": (8, 1, 80, 32)}
LENS = [1, 16, 63, 300, 193]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # accumulation order differs


@dataclass
class Case:
    """Sequences with shadow keys and what is calibrated for them."""

    paged: PagedSequences
    query: torch.Tensor
    projection: KeyProjection
    codes: torch.Tensor
    threshold: torch.Tensor  # [num_heads]
    margin: torch.Tensor
    scale: torch.Tensor
    soft_cap: float | None

    def run(
        self, *, threshold: torch.Tensor | None = None, margin: torch.Tensor | None = None, **options: Any
    ) -> Decoded:
        return decode(
            self.query,
            self.paged,
            self.threshold if threshold is None else threshold,
            codes=self.codes,
            shadow_layer=self.layer(self.margin if margin is None else margin),
            logits_soft_cap=self.soft_cap,
            **options,
        )

    def layer(self, margin: torch.Tensor) -> ShadowLayer:
        """The shadow keys."""
        ratio = torch.stack([self.scale.log(), torch.zeros_like(self.scale)], dim=-1)
        return ShadowLayer(built(self.projection), margin, ratio)

    def sequence(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = int(self.paged.seq_lens[row])
        return gather_sequence(self.paged.interleaved, self.paged.block_table[row], length)

    def candidates(self, row: int) -> torch.Tensor:
        query = quantize_query(
            self.query[row : row + 1].float(), self.projection, softmax_scale=self.query.shape[-1] ** -0.5
        )
        codes = encode_keys(self.sequence(row)[0], self.projection)
        return candidate_keys(
            shadow_scores(query, codes, logits_soft_cap=self.soft_cap)[0],
            self.threshold - self.margin,
            num_kv_heads=codes.shape[1],
            num_sink=NUM_FIRST_ANCHORS,
            num_recent=NUM_LAST_ANCHORS,
            block_size=self.paged.kv_cache.shape[2],
        )


def built(projection: KeyProjection) -> ShadowCodec:
    return ShadowCodec.build(projection.encoder, projection.decoder, projection.key_mean)


def shadow_keys(projection: KeyProjection) -> ShadowLayer:
    """What writing codes needs to know."""
    return ShadowLayer(built(projection), torch.empty(0), torch.empty(0))


def make_case(
    shape: str, block_size: int = 16, dtype: torch.dtype = torch.float32, soft_cap: float | None = None
) -> Case:
    generator = torch.Generator().manual_seed(5)
    num_heads, num_kv_heads, head_size, num_channels = SHAPES[shape]
    paged = PagedSequences.allocate(
        LENS,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        generator=generator,
        code_bytes=num_channels // 2,
    )
    identity = torch.eye(head_size).expand(num_kv_heads, -1, -1)
    falling = torch.linspace(1.5, 0.5, head_size)
    mean = 0.3 * torch.randn(num_kv_heads, head_size, generator=generator)
    projection = fit_projection(mean, identity * falling, identity, num_channels=num_channels)
    codes = codes_view(paged.kv_cache, num_channels // 2)
    codes.fill_(0xA5)
    for lens in ([0, 10, 40, 100, 192], LENS):
        before = paged.seq_lens
        paged.append(lens, generator)
        paged.write_tails(before, shadow_keys(projection), codes)
    query = torch.randn(len(LENS), num_heads, head_size, generator=generator).to(dtype)
    margin, scale = 0.3 * torch.rand(2, num_heads, generator=generator)
    rows = []
    for row, length in enumerate(LENS):
        key, _ = gather_sequence(paged.interleaved, paged.block_table[row], length)
        scores = causal_scores(query[row : row + 1], key, softmax_scale=head_size**-0.5, logits_soft_cap=soft_cap)[0]
        rows.append(scores)
    return Case(paged, query, projection, codes, in_a_gap(rows, 20), margin, 0.05 + scale, soft_cap)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("compensation", ["sdc+vmc", "sdc", "none"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block_size"), [("mha", 16), ("gqa 3", 32), ("gqa 3", 16), ("gqa 8", 128)])
def test_decode(
    shape: str, block_size: int, dtype: torch.dtype, soft_cap: float | None, compensation: str, has_sinks: bool
) -> None:
    case = make_case(shape, block_size, dtype, soft_cap)
    sinks = torch.linspace(-4.0, 8.0, case.query.shape[1]) if has_sinks else None
    estimated, value_mean = "sdc" in compensation, "vmc" in compensation
    result = case.run(denominator_compensation=estimated, value_mean=value_mean, sinks=sinks)
    group = case.query.shape[1] // case.paged.kv_cache.shape[1]
    for row, length in enumerate(LENS):
        candidates = case.candidates(row)
        expected, with_r = (
            top_theta_attention(
                case.query[row : row + 1],
                *case.sequence(row),
                threshold=case.threshold,
                target_k=0,
                softmax_scale=case.query.shape[-1] ** -0.5,
                logits_soft_cap=soft_cap,
                candidates=candidates.repeat_interleave(group, dim=0)[None],
                compensation=Compensation(denominator, value_mean, exp_threshold_scale=case.scale),
                sinks=sinks,
            )
            for denominator in ("candidates" if estimated else "none", "candidates")
        )
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        torch.testing.assert_close(result.lost_mass[row : row + 1], with_r.lost_mass, **TOLERANCE)
        assert result.keys_read[row].tolist() == candidates.sum(1).tolist()
        survivors = expected.survivors[0].unflatten(0, (-1, group)).any(1)
        if value_mean:  # the open page is read for the mean
            survivors[:, length // block_size * block_size :] = True
        assert result.value_rows_read[row].tolist() == survivors.sum(1).tolist()
    assert int(result.keys_read[3].min()) < 300  # something was skipped


@pytest.mark.parametrize("threshold", [-torch.inf, -50.0])
def test_thresholds_below_every_score_give_dense_attention(threshold: float) -> None:
    case = make_case("gqa 3")
    result = case.run(threshold=torch.full_like(case.threshold, threshold), margin=torch.full_like(case.margin, 1e4))
    for row, length in enumerate(LENS):
        expected = dense_attention(case.query[row : row + 1], *case.sequence(row), softmax_scale=0.125)
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        assert result.keys_read[row].tolist() == result.value_rows_read[row].tolist() == [length] * 3
    assert not result.lost_mass.any()


@pytest.mark.parametrize("estimated", [True, False])
@pytest.mark.parametrize("threshold", [40.0, torch.inf])
def test_without_survivors_the_output_is_the_mean_value(threshold: float, estimated: bool) -> None:
    case = make_case("mha")
    result = case.run(threshold=torch.full_like(case.threshold, threshold), denominator_compensation=estimated)
    for row in range(len(LENS)):
        expected = case.sequence(row)[1].mean(0)
        torch.testing.assert_close(result.output[row], expected, **TOLERANCE)
    assert bool((result.lost_mass == 1).all())
    # sinks, recent ones, and the page of the newest token; of values the open page, for the mean
    assert result.keys_read[:, 0].tolist() == [1, 16, 63, 16 + 128, 16 + 128]
    assert result.value_rows_read[:, 0].tolist() == [1, 0, 15, 12, 1]


def test_codes_are_the_references_however_the_tokens_came() -> None:
    case = make_case("gqa 3", dtype=torch.bfloat16)
    table = case.paged.block_table.long()
    for row, length in enumerate(LENS):
        num_full = length // 16
        if num_full:
            expected = pack_codes(encode_keys(case.sequence(row)[0][: num_full * 16], case.projection))
            stored = case.codes[table[row, :num_full]].transpose(1, 2).flatten(0, 1)
            assert float((stored != expected).float().mean()) < 1e-4
    assert bool((case.codes[table[2, 3]] == 0xA5).all())  # an open page
    written = case.codes.clone()
    case.paged.write_tails(torch.zeros(len(LENS), dtype=torch.int64), shadow_keys(case.projection), case.codes)
    assert torch.equal(case.codes, written)
