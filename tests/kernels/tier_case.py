"""Random decode steps with copies of keys and values, and what the reference makes of them.

A score that lies at a bound may be on either side of it in kernel and reference, so of many keys a few may be counted
otherwise. Copies of pages that are not full are left as garbage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.kernels.decode_case import (
    DEVICE,
    Case,
    Shape,
    check_closed_pages,
    emulated,
    error_of_dtype,
    make_case,
    reference,
)
from vllm_toptheta.kernels.codec import TierCodec
from vllm_toptheta.kernels.contract import Counters, DecodeStep, LayerCall, TierLayer
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader, loader_for, split_sizes
from vllm_toptheta.kernels.gpu.scratch import Sizes, TierScratch
from vllm_toptheta.kernels.gpu.tiers import decode
from vllm_toptheta.kernels.gpu.tuning import TIER_CONFIG, ShadowConfig
from vllm_toptheta.kernels.pages import CopyViews, codes_view
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import (
    KeyCopies,
    ValueCopies,
    copy_keys,
    copy_values,
    dense_attention,
    key_centre,
    tiered_attention,
)

GARBAGE = 0x7F  # as float16, NaN
SCANNING = TIER_CONFIG.scanning
QUERY_SIZE = 2.0  # so that rows have a few heavy keys
WEIGHT_FLOOR, HEAVY = 2.0, 0.02


@dataclass
class TierCase:
    """The tensors of a step, on the device, besides those of `case`."""

    case: Case
    codes: torch.Tensor
    layer: TierLayer
    weight_floor: float = WEIGHT_FLOOR
    heavy: float = HEAVY
    reads_all_keys: bool = False
    loader: TierLoader | None = None

    def run(
        self, config: ShadowConfig = SCANNING, scratch: TierScratch | None = None, **options: Any
    ) -> tuple[torch.Tensor, Counters]:
        """Output and counters; the kernels' memory starts out as NaN."""
        case = self.case
        if scratch is None:
            scratch = self.scratch(config)
            for buffer in scratch[3:]:
                buffer.view(torch.uint8).fill_(GARBAGE)
        counters = Counters.allocate(
            case.shape.num_heads, case.shape.num_kv_heads, DEVICE, counts_keys=True, counts_copies=True
        )
        output = torch.full_like(case.query, torch.nan, dtype=case.shape.dtype)
        decode(*self.records(**({"output": output, "counters": counters} | options)), scratch)
        return output, counters

    def scratch(self, config: ShadowConfig = SCANNING) -> TierScratch:
        """One for this step."""
        shape = self.case.shape
        sizes = Sizes(len(shape.lens), shape.num_heads, shape.num_kv_heads, shape.head_size)
        return TierScratch.allocate(
            sizes, kv_dtype=self.case.kv_cache.dtype, device=DEVICE, config=config, loader=self.loader
        )

    def records(self, output: torch.Tensor, **options: Any) -> tuple[DecodeStep, LayerCall]:
        """What the kernels take, as for `Case.records`."""
        return self.case.records(output, tiers=self.layer, codes=self.codes, **options)

    def write_tails(self, before: list[int], after: list[int]) -> None:
        """As `Case.write_tails`."""
        self.case.write_tails(before, after, tiers=self.layer, codes=self.codes, loader=self.loader)

    def copies(self, row: int) -> tuple[KeyCopies, ValueCopies]:
        """What the reference makes of a sequence as it is stored, scales left out."""
        key, value = replace(self.case, scales=None).sequence(row)
        return copy_keys(key, key_centre(key)), copy_values(value)

    def reference(self, row: int) -> Any:
        """The reference's result for a sequence that is not dense, float32."""
        case, shape = self.case, self.case.shape
        keys, values = scaled(*self.copies(row), *(case.scales or (1.0, 1.0)))
        return tiered_attention(
            case.new_query(row),
            *case.sequence(row),
            weight_floor=self.weight_floor,
            heavy=self.heavy,
            block_size=shape.block_size,
            softmax_scale=case.softmax_scale,
            logits_soft_cap=shape.soft_cap,
            sinks=case.sinks,
            keys=keys,
            values=values,
        )


def scaled(
    keys: KeyCopies, values: ValueCopies, k_scale: torch.Tensor | float, v_scale: torch.Tensor | float
) -> tuple[KeyCopies, ValueCopies]:
    """What copies of stored keys and values stand for."""
    return (
        KeyCopies(keys.codes, keys.step.float() * k_scale, keys.centre * k_scale),
        ValueCopies(values.codes, values.step.float() * v_scale),
    )


def make_tier_case(
    shape: Shape, *, weight_floor: float = WEIGHT_FLOOR, heavy: float = HEAVY, in_cuda: bool = False
) -> TierCase:
    """A step whose tokens have copies, but for those of pages that this step fills or leaves open."""
    shape = replace(shape, has_copies=True, slope=1.0, max_dense_len=max(shape.max_dense_len, NUM_ANCHORS))
    case = make_case(shape, threshold=math.log(weight_floor))
    case.coefficients[:, 1], case.coefficients[:, 3] = -1.0, 1.0
    case.query = (case.query.float() * QUERY_SIZE).to(case.query.dtype)
    layer = TierLayer(TierCodec.build(shape.head_size, DEVICE), math.log(heavy) if heavy else -math.inf)
    codes = codes_view(case.kv_cache, layer.codec.code_bytes)
    codes.fill_(GARBAGE)
    loader = cuda_loader(shape) if in_cuda else None
    tiers = TierCase(case, codes, layer, weight_floor, heavy, loader=loader)
    views = CopyViews.of(codes, shape.head_size)
    for row, length in enumerate(shape.lens):
        num_closed = max(0, length - 1) // shape.block_size
        if not num_closed:
            continue
        blocks = case.block_table[row, :num_closed].long()
        for view, stored in zip(views, packed(*tiers.copies(row)), strict=True):
            pages = stored[: num_closed * shape.block_size].unflatten(0, (num_closed, shape.block_size))
            view[blocks] = pages.transpose(1, 2)
    return tiers


def cuda_loader(shape: Shape) -> TierLoader:
    """Loads kernels in CUDA C++: on the device, or emulated where there is none."""
    group = shape.num_heads // shape.num_kv_heads
    if DEVICE == "cuda":
        return loader_for(torch.device("cuda", torch.cuda.current_device()), shape.head_size, group)
    return TierLoader(emulated, split_sizes(shape.head_size, group))


def packed(keys: KeyCopies, values: ValueCopies) -> tuple[torch.Tensor, ...]:
    """Copies as `CopyViews` has them, tokens first."""
    lower, upper = keys.codes.chunk(2, dim=-1)
    first, second, third, fourth = values.codes.chunk(4, dim=-1)
    return lower | upper << 4, first | second << 2 | third << 4 | fourth << 6, keys.step, values.step


def check(tiers: TierCase, output: torch.Tensor, counters: Counters) -> None:
    """Compare with the reference: what is read, lost mass, then the output and the tails."""
    case, shape = tiers.case, tiers.case.shape
    keys = torch.zeros(shape.num_kv_heads, dtype=torch.int64, device=DEVICE)
    rows, copies = torch.zeros_like(keys), torch.zeros_like(keys)
    lost_mass = torch.zeros(shape.num_heads, dtype=torch.float64, device=DEVICE)
    for row, length in enumerate(shape.lens):
        if length == 0:
            assert not output[row].any()
            continue
        if length <= shape.max_dense_len or tiers.reads_all_keys:
            keys += length
        if length <= shape.max_dense_len:
            dense = dense_attention(
                case.new_query(row), *case.sequence(row), softmax_scale=case.softmax_scale,
                logits_soft_cap=shape.soft_cap, sinks=case.sinks,
            )  # fmt: skip
            rows += length
            allowed = 2 * error_of_dtype(case, row, dense) + 1e-3
            assert float((output[row].float() - dense.output[0]).abs().max()) <= allowed
            continue
        if tiers.reads_all_keys:
            all_read = reference(case, row)
            allowed = 2 * error_of_dtype(case, row, all_read) + 1e-3
            assert float((output[row].float() - all_read.output[0]).abs().max()) <= allowed
            continue
        result = tiers.reference(row)
        survivors = result.survivors[0].view(shape.num_kv_heads, -1, length).any(1)
        exact = result.exact[0]
        read = survivors & exact
        if shape.value_mean:  # the open page is read for the mean
            read[:, length // shape.block_size * shape.block_size :] = True
        keys += exact.sum(1)
        rows += read.sum(1)
        copies += (survivors & ~exact).sum(1)
        lost_mass += result.lost_mass[0]
        # a light key on the wrong side of its bound changes the output by its weight at most
        allowed = 2 * error_of_dtype(case, row, result) + 2e-3 + 3 * tiers.weight_floor / length
        assert float((output[row].float() - result.output[0]).abs().max()) <= allowed
    if not tiers.reads_all_keys:
        for name, expected in (("keys_read", keys), ("value_rows_read", rows), ("copies_read", copies)):
            off = (getattr(counters, name) - expected).abs()
            assert bool((off <= 2 + 0.004 * expected).all()), (name, getattr(counters, name), expected)
        torch.testing.assert_close(counters.lost_mass, lost_mass, rtol=5e-3, atol=5e-3)
    assert counters.totals.tolist()[0] == sum(length > 0 for length in shape.lens)
    if shape.value_mean:
        check_closed_pages(case)
    check_copies(tiers)


def check_copies(tiers: TierCase) -> None:
    """The copies of every full page are the reference's, but for channels that lie where two codes meet."""
    shape = tiers.case.shape
    views = CopyViews.of(tiers.codes, shape.head_size)
    for row, length in enumerate(shape.lens):
        num_full = length // shape.block_size
        if not num_full:
            continue
        blocks = tiers.case.block_table[row, :num_full].long()
        stored = [view[blocks].transpose(1, 2).flatten(0, 1) for view in views]
        expected = [part[: num_full * shape.block_size] for part in packed(*tiers.copies(row))]
        for kind in range(2):  # keys, then values
            is_other = stored[kind] != expected[kind]
            assert float(is_other.float().mean()) < 2e-3
            # the step of a value is fitted to its codes
            is_same = ~is_other.any(dim=-1)
            torch.testing.assert_close(stored[2 + kind][is_same], expected[2 + kind][is_same], rtol=2e-3, atol=0)
