"""What both backends declare to vLLM: what is refused stands here, and is refused whatever their parents answer.

vLLM asks classes, method by method, and takes the answer of a parent where a class gives none; the GPU backend's is
FlashAttention, which mostly says yes. What depends on the platform (dtypes, sizes of heads and blocks, graphs) stands
with each backend. `tests/compat/test_capabilities.py` lists everything that vLLM asks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backend import AttentionType

NAME = "TOPTHETA"  # as in `--attention-backend`, whatever the case

# questions that vLLM calls, all answered no
REFUSED = {
    "is_mla": "there are no heads with values to skip",
    "is_sparse": "vLLM means layers that choose keys by an indexer of the model",
    "is_ssm": "states are no keys and values",
    "supports_alibi_sqrt": "kernels add no slopes to scores",
    "supports_mm_prefix": "decoded tokens see what comes before them only",
    "supports_non_causal": "likewise",
    "supports_non_causal_dcp": "likewise, and a sequence's scores would lie on several ranks",
    "supports_dcp": "a sequence's scores would lie on several ranks",
    "supports_pcp": "likewise",
    "supports_rswa": "windows that a model moves are not followed",
    "supports_batch_invariance": "how a sequence is split depends on the batch",
    "supports_per_head_quant_scales": "kernels take one scale for all heads",
    "supports_device_cpu_query_lens_mismatch": "steps are divided by the lengths on the host",
}


class BackendCapabilities:
    """Stands before vLLM's class among the bases of an `AttentionBackend`; answers `REFUSED` with no."""

    # vLLM's own operation writes keys and values, so they are in the cache when a layer attends
    forward_includes_kv_cache_update: ClassVar[bool] = False
    supports_kv_cache_update_bypass: ClassVar[bool] = False

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enum that stands for the class."""
        return NAME

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Whether decoders', encoders' or other attention can be computed."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes: layers with a window are dense."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Yes: which of them, `support.connectors` says."""
        return True


def _no(cls: Any) -> bool:
    return False


for _question in REFUSED:
    setattr(BackendCapabilities, _question, classmethod(_no))


class BuilderCapabilities:
    """Stands before vLLM's class among the bases of an `AttentionMetadataBuilder`: metadata is built for every step."""

    supports_update_block_table: bool = False
    supports_draft_decode_metadata_update: bool = False


class ImplCapabilities:
    """Stands before vLLM's class among the bases of an `AttentionImpl`."""

    is_sparse: ClassVar[bool] = False
    supports_dcp: ClassVar[bool] = False
    supports_pcp: ClassVar[bool] = False
    supports_mtp_with_cp_non_trivial_interleave_size: ClassVar[bool] = False
    supports_dense_mha_prefill: ClassVar[bool] = False  # asked of MLA layers
    can_return_lse_for_decode: ClassVar[bool] = False  # asked under context parallelism
