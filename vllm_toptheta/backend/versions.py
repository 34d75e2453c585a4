"""Which versions of vLLM are supported, and what of their data differs; `hooks` says where their code does.

Differences are found by looking for features, not for numbers.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.limits import ALLOW_UNTESTED

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

OLDEST, NEWEST = (0, 26), (0, 33)  # minor versions, both included


def check_version(version: str) -> None:
    """Refuse a vLLM whose backend contract nobody has compared with this code.

    Raises:
        UnsupportedError: `version` is older or newer than the supported ones, and `ALLOW_UNTESTED` is not set.
    """
    minor = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= minor <= NEWEST and os.environ.get(ALLOW_UNTESTED) != "1":
        supported = " to ".join(".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise UnsupportedError(
            f"attention backend toptheta supports vLLM {supported}, this is {version}",
            remedy=f"Install a supported version, or try this one with {ALLOW_UNTESTED}=1",
        )


def with_all_rows(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The same, if need be with the rows that a graph is padded with, of which vLLM's V2 runner does not say that they
    are no prompts.
    """
    known = common.is_prefilling
    if known is None or len(known) == common.num_reqs:
        return common
    return replace(common, is_prefilling=torch.nn.functional.pad(known, (0, common.num_reqs - len(known))))


def without_decodes(common: CommonAttentionMetadata, num_decodes: int, num_decode_tokens: int) -> Any:
    """The part of a batch behind its decoding sequences, which stand in front.

    Args:
        common: The batch.
        num_decodes: Sequences that decode.
        num_decode_tokens: Their tokens.
    """
    changes: dict[str, Any] = {}
    for field in fields(common):
        value = getattr(common, field.name)
        if isinstance(value, torch.Tensor) and len(value) == common.num_reqs:
            changes[field.name] = value[num_decodes:]
    changes |= {
        "query_start_loc": common.query_start_loc[num_decodes:] - num_decode_tokens,
        "query_start_loc_cpu": common.query_start_loc_cpu[num_decodes:] - num_decode_tokens,
        "slot_mapping": common.slot_mapping[num_decode_tokens:],
        "num_reqs": common.num_reqs - num_decodes,
        "num_actual_tokens": common.num_actual_tokens - num_decode_tokens,
    }
    for name in ("positions", "_num_computed_tokens_cache", "_token_to_req_indices_cache"):
        if hasattr(common, name):
            changes[name] = None  # derived or optional; rebuilt from the rest where it is needed
    if getattr(common, "req_idx", None) is not None:
        changes["req_idx"] = common.req_idx[num_decodes:]
    return replace(common, **changes)
