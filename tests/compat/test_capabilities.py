"""Everything that vLLM asks of a backend, by name: what a new release asks must be decided here before it is supported.

A name is refused, and then our classes must say no, whatever their parents say; or it is accepted, with a reason.
"""

from __future__ import annotations

import json

import pytest

from tests.compat.release import Release
from vllm_toptheta.backend import capabilities

pytestmark = pytest.mark.compat

# of the backend; FlashAttention's answers are meant on GPUs, those of vLLM's base class on CPUs
BACKEND_ACCEPTED = {
    "get_supported_head_sizes": "what `supports_head_size` looks into on CPUs, where any size is taken",
    "get_supported_kernel_block_sizes": "pages are read in whole numbers of 16 tokens",
    "supported_dtypes": "16 bits; CPUs compute in 32 bits anyway",
    "supported_kv_cache_dtypes": "on GPUs, what is left of it by `supports_kv_cache_dtype`",
    "supported_kv_cache_layouts": "kernels go by strides; vLLM asserts that padded pages lie in one piece",
    "supports_attn_type": "decoders only",
    "supports_block_size": "by `get_supported_kernel_block_sizes`",
    "supports_combination": "prompts and dense layers are FlashAttention's, and so are its reasons",
    "supports_compute_capability": "FlashAttention's 8.0 is also the first with bfloat16, which kernels multiply in",
    "supports_dtype": "by `supported_dtypes`",
    "supports_head_size": "those of `limits.HEAD_SIZES` that FlashAttention takes",
    "supports_kv_cache_dtype": "16 bits, and on GPUs float8 e4m3 with one scale",
    "supports_kv_connector": "those that `support.connectors` names; tails are made again, or travel in rows of pages",
    "supports_sink": "kernels of decoding add them, and on GPUs FlashAttention for prompts, where it has them",
    "supports_sliding_window": "layers with a window are dense",
}
BACKEND_REFUSED = {
    *("is_mla", "is_sparse", "is_ssm", "supports_alibi_sqrt", "supports_batch_invariance", "supports_dcp"),
    *("supports_device_cpu_query_lens_mismatch", "supports_mm_prefix", "supports_non_causal"),
    *("supports_non_causal_dcp", "supports_pcp", "supports_per_head_quant_scales", "supports_rswa"),
    # attributes: keys and values are in the cache when a layer attends, and vLLM's own operation wrote them
    *("forward_includes_kv_cache_update", "supports_kv_cache_update_bypass"),
}
BUILDER_ACCEPTED = {"_cudagraph_support": "on GPUs steps that only decode are captured; forward branches on the host"}
BUILDER_REFUSED = {"supports_update_block_table", "supports_draft_decode_metadata_update"}
IMPL_ACCEPTED = {"supports_quant_query_input": "float8 queries come with a scale, which the kernels of GPUs apply"}
IMPL_REFUSED = {
    *("can_return_lse_for_decode", "is_sparse", "supports_dcp", "supports_dense_mha_prefill"),
    *("supports_mtp_with_cp_non_trivial_interleave_size", "supports_pcp"),
}
ACCEPTED = {"backend": BACKEND_ACCEPTED, "builder": BUILDER_ACCEPTED, "impl": IMPL_ACCEPTED}
REFUSED = {"backend": BACKEND_REFUSED, "builder": BUILDER_REFUSED, "impl": IMPL_REFUSED}

# prints the names that vLLM's parents of each of a platform's classes have, and the answers that need no arguments
ASK = r"""
import inspect, json, re
from vllm_toptheta.backend.{platform} import {backend} as backend
wanted = re.compile("(supports|supported|get_supported|is|can|forward_includes)_|_cudagraph_support$")
ours = dict(backend=backend, builder=backend.get_builder_cls(), impl=backend.get_impl_cls())
found = {{}}
for role, cls in ours.items():
    parents = [one for one in cls.__mro__ if one.__module__.startswith("vllm.")]
    assert parents, role
    names = {{name for one in parents for name in vars(one) if wanted.match(name)}}
    answers = {{}}
    for name in sorted(names):
        answer = getattr(cls, name)
        if callable(answer) and not inspect.signature(answer).parameters:
            answer = answer()
        answers[name] = answer if answer in (True, False) else "asked with arguments, or no yes and no"
    found[role] = answers
print(json.dumps(found))
"""
CLASSES = {"cpu": "CpuTopThetaBackend", "gpu": "GpuTopThetaBackend"}


@pytest.mark.parametrize("platform", CLASSES)
def test_every_question_is_decided_and_what_is_refused_is_answered_no(release: Release, platform: str) -> None:
    found = json.loads(release.run(ASK.format(platform=platform, backend=CLASSES[platform])))
    undecided = {f"{role}.{name}" for role, answers in found.items() for name in answers.keys() - ACCEPTED[role].keys()}
    undecided -= {f"{role}.{name}" for role, names in REFUSED.items() for name in names}
    assert not undecided, "new in this release: refuse it, or accept it with a reason"
    for role, answers in found.items():
        assert {name for name in REFUSED[role] & answers.keys() if answers[name] is not False} == set(), role


def test_a_question_stands_in_one_table() -> None:
    for role, names in REFUSED.items():
        assert not names & ACCEPTED[role].keys()
    assert capabilities.REFUSED.keys() < REFUSED["backend"]


def test_what_is_accepted_is_bounded(release: Release) -> None:
    code = (
        "import torch\n"
        "from vllm.platforms.interface import DeviceCapability\n"
        "from vllm_toptheta.backend.cpu import CpuTopThetaBackend as Cpu\n"
        "from vllm_toptheta.backend.gpu import GpuTopThetaBackend as Gpu\n"
        "for backend in (Cpu, Gpu):\n"
        "    assert backend.supports_attn_type('decoder')\n"
        "    for other in ('encoder', 'encoder_only', 'encoder_decoder'):\n"
        "        assert not backend.supports_attn_type(other)\n"
        "    assert backend.supports_block_size(16) and backend.supports_block_size(128)\n"
        "    assert not backend.supports_block_size(8) and not backend.supports_block_size(24)\n"
        "    assert backend.supports_dtype(torch.bfloat16) and not backend.supports_dtype(torch.float64)\n"
        "    assert backend.supports_kv_cache_dtype('auto') and backend.supports_kv_cache_dtype('bfloat16')\n"
        "    for other in ('fp8_e5m2', 'int8_per_token_head', 'fp8_per_token_head', 'nvfp4', 'turboquant_k8v4'):\n"
        "        assert not backend.supports_kv_cache_dtype(other)\n"
        "    assert backend.supports_head_size(128) and backend.supports_sliding_window()\n"
        "assert Cpu.supports_head_size(72) and not Gpu.supports_head_size(72)\n"
        "assert Cpu.supports_dtype(torch.float32) and not Gpu.supports_dtype(torch.float32)\n"
        "assert not Cpu.supports_kv_cache_dtype('fp8')\n"
        "assert Cpu.supports_sink()\n"
        "assert Gpu.supports_compute_capability(DeviceCapability(8, 0))\n"
        "assert not Gpu.supports_compute_capability(DeviceCapability(7, 5))\n"
        "assert not Cpu.get_impl_cls().supports_quant_query_input\n"
        "print('bounded')\n"
    )
    assert release.run(code) == "bounded"
