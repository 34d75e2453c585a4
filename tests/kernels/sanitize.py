"""A few decode steps for NVIDIA's compute-sanitizer, which makes every kernel slow.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitize unchecked

`unchecked` leaves out thresholds and comparisons made with cuBLAS, in a kernel of which racecheck itself fails.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from tests.kernels.decode_case import DEVICE, Shape, check, cuda_loader, make_case
from tests.kernels.shadow_case import check as check_shadow
from tests.kernels.shadow_case import make_shadow_case
from tests.kernels.tier_case import check as check_tiers
from tests.kernels.tier_case import make_tier_case
from tests.kernels.verified_case import Verified
from vllm_toptheta.kernels.gpu.balance import MOST_OF_A_HEAD
from vllm_toptheta.kernels.gpu.tuning import num_multiprocessors

SHAPES = (
    Shape((1, 0, 64, 130, 3000), num_heads=8, head_size=128, dtype=torch.bfloat16, max_dense_len=130),
    Shape((700, 17), num_heads=16, num_kv_heads=1, head_size=80, block_size=32, layout="HND"),
    Shape((700, 17), num_heads=4, num_kv_heads=4, head_size=96, dtype=torch.bfloat16, block_size=32),
    Shape((900, 16), kv_dtype=torch.float8_e4m3fn, dtype=torch.bfloat16, head_size=128, soft_cap=20.0),
)
DRAFTS = (
    (Shape((1000, 64, 130, 3000), num_heads=8, head_size=128, dtype=torch.bfloat16, max_dense_len=130), (4, 4, 2, 1)),
    (Shape((700, 17), num_heads=8, num_kv_heads=1, head_size=80, block_size=32, layout="HND"), (8, 3)),
)
SHADOW_SHAPES = (
    Shape((64, 0, 130, 3000), num_heads=8, head_size=128, dtype=torch.bfloat16, num_channels=64),
    Shape((900, 16), head_size=128, dtype=torch.bfloat16, num_channels=32, max_dense_len=100),
)
TIER_SHAPES = (
    Shape((64, 0, 160, 3000), num_heads=8, head_size=128, dtype=torch.bfloat16),
    Shape((900, 320), num_heads=7, num_kv_heads=1, block_size=32),
    Shape((2000, 17), num_heads=2, num_kv_heads=1, head_size=256, dtype=torch.bfloat16, soft_cap=20.0),
)
THRESHOLD = 1.0  # where none is placed: about one key in six survives


def most_of_the_first(num_kv_heads: int, num_programs: int) -> torch.Tensor:
    """Programs of kv heads, of which the first has as many as it may have."""
    others = num_kv_heads - 1
    first = min(MOST_OF_A_HEAD * num_programs, num_kv_heads * num_programs - others)
    return torch.tensor([first, *[1] * others], dtype=torch.int32, device=DEVICE)


if __name__ == "__main__":
    is_checked = "unchecked" not in sys.argv
    for shape in SHAPES:
        case = make_case(shape, threshold=None if is_checked else THRESHOLD)
        for loader in {None, cuda_loader(shape)}:
            scratch = case.scratch(loader=loader)
            num_programs = scratch.config.num_programs(shape.num_kv_heads, num_multiprocessors(case.query.device))
            head_programs = most_of_the_first(shape.num_kv_heads, num_programs)
            output, counters = case.run(scratch=scratch, head_programs=head_programs)
            if is_checked:
                check(case, output, counters)
            case.write_tails([0] * len(shape.lens), list(shape.lens))
            torch.cuda.synchronize()
            sys.stdout.write(f"{shape.lens}: rows read {counters.value_rows_read.tolist()}\n")
    for shape, query_lens in DRAFTS:
        verified = Verified.make(shape, query_lens, threshold=None if is_checked else THRESHOLD)
        for loader in {None, cuda_loader(replace(shape, num_heads=shape.num_heads * max(query_lens)))}:
            output, counters = verified.run(loader=loader)
            if is_checked:
                verified.check(output, counters)
            torch.cuda.synchronize()
            sys.stdout.write(f"{shape.lens} with drafts: rows read {counters.value_rows_read.tolist()}\n")
    for shape in SHADOW_SHAPES:
        shadow = make_shadow_case(shape, threshold=None if is_checked else THRESHOLD)
        output, counters, keys_read = shadow.run()
        shadow.write_tails([0] * len(shape.lens), list(shape.lens))
        if is_checked:
            check_shadow(shadow, output, counters, keys_read)
        torch.cuda.synchronize()
        sys.stdout.write(
            f"{shape.lens}: keys read {keys_read.tolist()}, rows read {counters.value_rows_read.tolist()}\n"
        )
    for shape in TIER_SHAPES:
        tiers = make_tier_case(shape, in_cuda=True)
        scratch = tiers.scratch()
        num_programs = scratch.config.num_programs(shape.num_kv_heads, num_multiprocessors(tiers.case.query.device))
        output, counters = tiers.run(scratch=scratch, head_programs=most_of_the_first(shape.num_kv_heads, num_programs))
        tiers.write_tails([0] * len(shape.lens), list(shape.lens))
        if is_checked:
            check_tiers(tiers, output, counters)
        torch.cuda.synchronize()
        sys.stdout.write(f"{shape.lens}: keys read {counters.keys_read.tolist()}\n")
