"""What kernels exist for, and facts that they share with those who count, store and calibrate.

May import nothing of the package.
"""

from __future__ import annotations

import math
from bisect import bisect_left

# of GPUs; CPUs take heads of any size in groups of any number
HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_QUERIES_PER_KV = 16
# likewise: tokens of a sequence that are decoded in one step, a token and drafts of those behind it
MAX_QUERY_LEN = 8
# of the KV cache, as vLLM names them; float8 is for GPUs, and whether a card can is for FlashAttention to say
CACHE_DTYPES = ("auto", "float16", "bfloat16")
FLOAT8_CACHE_DTYPES = ("fp8", "fp8_e4m3")
# pages hold a multiple of so many tokens
BLOCK_MULTIPLE = 16
# longer pages, which models with states have, are split into pages of a divisor of that many
MAX_SPLIT_TOKENS = 128

# how many channels shadow keys may have: what kernels exist for, and calibration aims at
CHANNELS = (32, 64, 128)

# upper edges, included, of the buckets that lost masses are counted in
LOST_MASS_EDGES = tuple(2.0**exponent for exponent in range(-9, 1))
NUM_LOST_MASS_BUCKETS = len(LOST_MASS_EDGES)
DEFAULT_MAX_LOST_MASS = 0.5

# The anchors of a sequence: its first and its last keys. Their exact scores bound the softmax denominator from below
# before any other key is scored; sequences of no more keys than that are dense.
NUM_FIRST_ANCHORS = 16
NUM_LAST_ANCHORS = 128
NUM_ANCHORS = NUM_FIRST_ANCHORS + NUM_LAST_ANCHORS

# in multiples of the average softmax weight 1 / n; 0 is dense. The default is measured (docs/accuracy.md)
DEFAULT_WEIGHT_FLOOR = 2.0
MAX_WEIGHT_FLOOR = 1000.0
# what a key must weigh to be read exactly where there are copies, in multiples of what the anchors of its row weigh
DEFAULT_HEAVY = 0.007
# where there are copies of keys and values: codes of a head fill bytes
COPY_MULTIPLE = 8
# likewise, of GPUs
TIER_HEAD_SIZES = (64, 128, 256)
# of heads of 256 with copies: with more, a kernel was seen to read where there is nothing
TIER_WIDE_QUERIES_PER_KV = 8
# with copies: KL to dense attention of at most 0.001 at 2,048 tokens asks for a lower floor (docs/shadow.md)
DEFAULT_TIER_WEIGHT_FLOOR = 1.0

# of ln r: keeps the missing mass of a row finite in float32
MAX_LOG_SCALE = math.log(1e6)


def first_bucket_above(lost_mass: float) -> int:
    """The first bucket that lies wholly above a lost mass; `NUM_LOST_MASS_BUCKETS` where none does."""
    return 1 + bisect_left(LOST_MASS_EDGES, lost_mass)


def channels_for(head_size: int) -> tuple[int, ...]:
    """Numbers of channels that there are kernels for."""
    return tuple(number for number in CHANNELS if number <= head_size)


def gpus_lack(head_size: int, num_heads: int, num_kv_heads: int, *, has_copies: bool = False) -> str:
    """Why GPUs have no kernels for a model; empty if they have.

    Args:
        head_size: Numbers of a key or a value.
        num_heads: Query heads of a layer.
        num_kv_heads: Key and value heads of a layer.
        has_copies: Whether there are copies of keys and values.
    """
    reasons = []
    sizes = TIER_HEAD_SIZES if has_copies else HEAD_SIZES
    if head_size not in sizes:
        of_copies = "copies of " if has_copies and head_size in HEAD_SIZES else ""
        reasons.append(f"{of_copies}heads of {head_size}, only of {', '.join(map(str, sizes))}")
    is_wide = has_copies and head_size == max(TIER_HEAD_SIZES)
    most = TIER_WIDE_QUERIES_PER_KV if is_wide else MAX_QUERIES_PER_KV
    if num_heads // num_kv_heads > most:
        reasons.append(f"{num_heads // num_kv_heads} query heads per kv head, only for up to {most}")
    return f"there are no GPU kernels for {' and '.join(reasons)}" if reasons else ""


# a variable of the environment that allows versions of vLLM that nobody has run
ALLOW_UNTESTED = "TOPTHETA_ALLOW_UNTESTED_VLLM"
