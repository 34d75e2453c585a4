"""Random decode steps with shadow keys, and what the reference makes of them.

Sums of products of codes are integers, so kernel and reference must agree on every candidate; margins are moved until
no floor lies near an integer. Codes of pages that are not full are left as garbage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.kernels.decode_case import DEVICE, Case, Shape, error_of_dtype, make_case, thresholds
from vllm_toptheta.kernels.codec import ShadowCodec
from vllm_toptheta.kernels.contract import Counters, DecodeStep, LayerCall, ShadowLayer
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch, Sizes
from vllm_toptheta.kernels.gpu.shadow import decode
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig
from vllm_toptheta.kernels.pages import codes_view
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import (
    Compensation,
    KeyProjection,
    candidate_keys,
    dense_attention,
    encode_keys,
    fit_projection,
    pack_codes,
    quantize_query,
    shadow_scores,
    top_theta_attention,
)

GARBAGE = 0xA5
SCANNING = ShadowConfig().scanning
MIN_DISTANCE = 0.02  # of a floor to the nearest integer


@dataclass
class ShadowCase:
    """The tensors of a step, on the device, besides those of `case`."""

    case: Case
    codes: torch.Tensor
    projection: KeyProjection
    margin: torch.Tensor  # [num_heads]
    log_scale: torch.Tensor  # [num_heads, 2]
    reads_all_keys: bool = False

    def run(
        self, config: ShadowConfig = SCANNING, scratch: ShadowScratch | None = None, **options: Any
    ) -> tuple[torch.Tensor, Counters, torch.Tensor]:
        """Output, counters and exact keys read; the kernels' memory starts out as NaN."""
        case = self.case
        if scratch is None:
            scratch = self.scratch(config)
            for buffer in scratch[2:]:
                buffer.view(torch.uint8).fill_(0x7F)
        else:
            scratch = scratch._replace(config=config)
        counters = Counters.allocate(case.shape.num_heads, case.shape.num_kv_heads, DEVICE, counts_keys=True)
        output = torch.full_like(case.query, torch.nan, dtype=case.shape.dtype)
        decode(*self.records(**({"output": output, "counters": counters} | options)), scratch)
        assert counters.keys_read is not None
        return output, counters, counters.keys_read

    def scratch(self, config: ShadowConfig = SCANNING) -> ShadowScratch:
        """One for this step."""
        shape = self.case.shape
        sizes = Sizes(len(shape.lens), shape.num_heads, shape.num_kv_heads, shape.head_size, shape.num_channels // 2)
        return ShadowScratch.allocate(sizes, kv_dtype=self.case.kv_cache.dtype, device=DEVICE, config=config)

    def records(
        self,
        output: torch.Tensor,
        **options: Any,
    ) -> tuple[DecodeStep, LayerCall]:
        """What the kernels take, as for `Case.records`."""
        return self.case.records(output, shadow=self.layer, codes=self.codes, **options)

    @property
    def layer(self) -> ShadowLayer:
        """The shadow keys."""
        return ShadowLayer(kernel_projection(self.projection), self.margin, self.log_scale)

    def write_tails(self, before: list[int], after: list[int]) -> None:
        """As `Case.write_tails`."""
        self.case.write_tails(before, after, self.layer, self.codes)

    def ratio(self, row: int) -> torch.Tensor:
        """r of a sequence, `[num_heads]`."""
        log_length = self.case.seq_lens[row].clamp(*self.case.length_range).float().log()
        return (self.log_scale[:, 0] + self.log_scale[:, 1] * log_length).exp()

    def candidates(self, row: int) -> torch.Tensor:
        """Keys of a sequence that are read exactly, `[num_kv_heads, seq_len]` bool."""
        shape = self.case.shape
        if self.reads_all_keys:
            return torch.ones(shape.num_kv_heads, shape.lens[row], dtype=torch.bool, device=DEVICE)
        query = quantize_query(self.case.new_query(row), self.projection, softmax_scale=self.case.softmax_scale)
        key, _ = self.case.sequence(row)
        scores = shadow_scores(query, encode_keys(key, self.projection), logits_soft_cap=shape.soft_cap)[0]
        return candidate_keys(
            scores,
            thresholds(self.case)[row] - self.margin,
            num_kv_heads=shape.num_kv_heads,
            num_sink=NUM_FIRST_ANCHORS,
            num_recent=NUM_LAST_ANCHORS,
            block_size=shape.block_size,
        )

    def reference(self, row: int, *, exact: bool | None = None) -> Any:
        """The reference's result for a sequence, float32."""
        case, shape = self.case, self.case.shape
        key, value = case.sequence(row)
        options = {"softmax_scale": case.softmax_scale, "logits_soft_cap": shape.soft_cap, "sinks": case.sinks}
        if shape.lens[row] <= shape.max_dense_len:
            return dense_attention(case.new_query(row), key, value, **options)
        exact = shape.exact if exact is None else exact
        return top_theta_attention(
            case.new_query(row),
            key,
            value,
            threshold=thresholds(case)[row : row + 1],
            target_k=0,
            candidates=self.candidates(row).repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=0)[None],
            compensation=Compensation(
                "candidates" if exact else "none", shape.value_mean, exp_threshold_scale=self.ratio(row)
            ),
            **options,
        )


def kernel_projection(projection: KeyProjection) -> ShadowCodec:
    return ShadowCodec.build(projection.encoder, projection.decoder, projection.key_mean)


def random_projection(shape: Shape) -> KeyProjection:
    """A projection of the queries and keys of `make_case`, but for its own idea of their moments."""
    generator = torch.Generator(DEVICE).manual_seed(shape.seed + 1)
    sizes = shape.num_kv_heads, shape.head_size, shape.head_size
    factors = 0.5 * torch.randn(2, *sizes, generator=generator, device=DEVICE) / shape.head_size**0.5
    moments = torch.eye(shape.head_size, device=DEVICE) + factors @ factors.mT
    mean = 0.3 * torch.randn(sizes[:2], generator=generator, device=DEVICE)
    return fit_projection(mean, moments[0], moments[1], num_channels=shape.num_channels)


def make_shadow_case(shape: Shape, threshold: float | None = None, margin: float = 0.3) -> ShadowCase:
    """A step whose tokens have shadow keys, but for those of pages that this step fills or leaves open."""
    case = make_case(shape, threshold)
    projection = random_projection(shape)
    codes = codes_view(case.kv_cache, shape.num_channels // 2)
    codes.fill_(GARBAGE)
    for row, length in enumerate(shape.lens):
        num_closed = max(0, length - 1) // shape.block_size
        if num_closed:
            key = case.sequence(row)[0][: num_closed * shape.block_size]
            packed = pack_codes(encode_keys(key, projection))
            blocks = case.block_table[row, :num_closed].long()
            codes[blocks] = packed.unflatten(0, (num_closed, shape.block_size)).transpose(1, 2)
    generator = torch.Generator(DEVICE).manual_seed(shape.seed + 2)
    margins = margin * (0.5 + torch.rand(shape.num_heads, generator=generator, device=DEVICE))
    constants, slopes = torch.rand(2, shape.num_heads, generator=generator, device=DEVICE)
    # r of 0.03 to 0.4 at these lengths
    log_scale = torch.stack([constants - 1.0, -0.1 - 0.3 * slopes], dim=1)
    shadow = ShadowCase(case, codes, projection, margins, log_scale)
    for attempt in range(1, 100):
        too_near = _near_integers(shadow)
        if not bool(too_near.any()):
            return shadow
        shadow.margin += 1e-3 * attempt * too_near
    raise AssertionError("no margins away from every integer")


def check(
    shadow: ShadowCase,
    output: torch.Tensor,
    counters: Counters,
    keys_read: torch.Tensor,
) -> None:
    """Compare with the reference: keys and rows read exactly, lost mass, then the output."""
    case, shape = shadow.case, shadow.case.shape
    rows = torch.zeros(shape.num_kv_heads, dtype=torch.int64, device=DEVICE)
    keys = torch.zeros_like(rows)
    lost_mass = torch.zeros(shape.num_heads, dtype=torch.float64, device=DEVICE)
    worst = allowed = 0.0
    for row, length in enumerate(shape.lens):
        if length == 0:
            assert not output[row].any()
            continue
        result = shadow.reference(row)
        is_dense = length <= shape.max_dense_len
        survivors = result.survivors[0].view(shape.num_kv_heads, -1, length).any(1)
        if shape.value_mean and not is_dense:  # the open page is read for the mean
            survivors[:, length // shape.block_size * shape.block_size :] = True
        rows += survivors.sum(1)
        keys += length if is_dense else shadow.candidates(row).sum(1)
        lost_mass += shadow.reference(row, exact=True).lost_mass[0]
        assert bool(output[row].isfinite().all()), f"the output of sequence {row} is not finite"
        worst = max(worst, float((output[row].float() - result.output[0]).abs().max()))
        allowed = max(allowed, 2 * error_of_dtype(case, row, result))
    assert keys_read.tolist() == keys.tolist()
    assert counters.value_rows_read.tolist() == rows.tolist()
    torch.testing.assert_close(counters.lost_mass, lost_mass, rtol=1e-3, atol=1e-5 * len(shape.lens))
    assert worst <= allowed + 1e-3, f"error {worst}, allowed {allowed} + 1e-3"
    check_codes(shadow)


def check_codes(shadow: ShadowCase) -> None:
    """The codes of every full page are the reference's, but for keys that lie where two codes meet."""
    shape = shadow.case.shape
    for row, length in enumerate(shape.lens):
        num_full = length // shape.block_size
        if not num_full:
            continue
        key = shadow.case.sequence(row)[0][: num_full * shape.block_size]
        expected = pack_codes(encode_keys(key, shadow.projection))
        stored = shadow.codes[shadow.case.block_table[row, :num_full].long()].transpose(1, 2).flatten(0, 1)
        assert float((stored != expected).float().mean()) < 1e-4


def _near_integers(shadow: ShadowCase) -> torch.Tensor:
    """Heads whose floor lies near an integer for some sequence, [num_heads] bool."""
    case, cap = shadow.case, shadow.case.shape.soft_cap
    near = torch.zeros(case.shape.num_heads, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate(case.shape.lens):
        if length > case.shape.max_dense_len:
            query = quantize_query(case.new_query(row), shadow.projection, softmax_scale=case.softmax_scale)
            wanted = thresholds(case)[row] - shadow.margin
            if cap is not None:
                wanted = cap * torch.atanh((wanted / cap).clamp(-0.9999, 0.9999))
            floor = (wanted - query.offset[0]) / query.step[0]
            near |= (floor - floor.round()).abs() < MIN_DISTANCE
    return near
