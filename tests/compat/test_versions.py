"""Parsing, pickling and batch slicing on the oldest, the newest and the installed vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm

from tests.compat.release import Release
from vllm_toptheta.backend import versions
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.limits import ALLOW_UNTESTED

pytestmark = pytest.mark.compat


REGISTER = "from vllm_toptheta.backend.plugin import register; register(); register()\n"


def test_the_files_are_those_of_that_version(release: Release) -> None:
    file, version = release.run("import vllm; print(vllm.__file__, vllm.__version__)").split()
    assert Path(file).parents[1] == release.files
    assert version == vllm.__version__ or version in release.files.name


@pytest.mark.parametrize("name", ["toptheta", "TopTheta"])
def test_the_name_is_parsed(release: Release, name: str) -> None:
    code = REGISTER + f"from vllm.config import AttentionConfig; print(AttentionConfig(backend={name!r}).backend.name)"
    assert release.run(code) == "TOPTHETA"


def test_the_member_crosses_processes(release: Release) -> None:
    code = REGISTER + (
        "import pickle, subprocess, sys\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "data = pickle.dumps([Backends.TOPTHETA, Backends.FLASH_ATTN])\n"
        "code = 'import pickle, sys; print([m.name for m in pickle.loads(sys.stdin.buffer.read())])'\n"
        "print(subprocess.run([sys.executable, '-c', code], input=data, capture_output=True).stdout.decode())\n"
    )
    assert release.run(code) == "['TOPTHETA', 'FLASH_ATTN']"


def test_prefills_are_cut_off_a_mixed_batch(release: Release) -> None:
    code = (
        "import torch\n"
        "from vllm.v1.attention.backend import CommonAttentionMetadata\n"
        "from vllm_toptheta.backend.versions import without_decodes\n"
        "starts = torch.tensor([0, 1, 2, 7, 16], dtype=torch.int32)\n"
        "common = CommonAttentionMetadata(query_start_loc=starts, query_start_loc_cpu=starts,\n"
        "    seq_lens=torch.tensor([5, 9, 30, 40]), num_reqs=4, num_actual_tokens=16, max_query_len=9,\n"
        "    max_seq_len=40,\n"
        "    block_table_tensor=torch.arange(12).view(4, 3), slot_mapping=torch.arange(16),\n"
        "    is_prefilling=torch.tensor([False, False, True, True]))\n"
        "rest = without_decodes(common, 2, 2)\n"
        "print(rest.query_start_loc.tolist(), rest.seq_lens.tolist(), rest.num_reqs, rest.num_actual_tokens,\n"
        "      rest.block_table_tensor[:, 0].tolist(), rest.slot_mapping.tolist()[0], rest.is_prefilling.tolist())\n"
    )
    assert release.run(code) == "[0, 5, 14] [30, 40] 2 14 [6, 9] 2 [True, True]"


def test_the_gpu_classes_import_and_fit(release: Release) -> None:
    code = REGISTER + (
        "import inspect\n"
        "from vllm_toptheta.backend import gpu\n"
        "from vllm.v1.attention.backends import flash_attn\n"
        "assert gpu.GpuTopThetaBackend.get_name() == 'TOPTHETA'\n"
        "for ours, theirs in ((gpu.GpuTopThetaImpl, flash_attn.FlashAttentionImpl),\n"
        "                     (gpu.GpuMetadataBuilder, flash_attn.FlashAttentionMetadataBuilder)):\n"
        "    name = 'build' if 'Builder' in ours.__name__ else 'forward'\n"
        "    assert name in vars(ours), name\n"
        "    expected = list(inspect.signature(getattr(theirs, name)).parameters)\n"
        "    assert list(inspect.signature(getattr(ours, name)).parameters) == expected, name\n"
        "print(gpu.GpuMetadataBuilder._cudagraph_support.name)\n"
    )
    assert release.run(code) == "UNIFORM_SINGLE_TOKEN_DECODE"


def test_what_vllm_gives_back_when_it_wakes_up_is_told_by_its_file(release: Release) -> None:
    """What it really keeps, at both levels, and in which pool it makes what our builder keeps."""
    code = (
        "import inspect\n"
        "import vllm.device_allocator as allocator\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.device_allocator.sleep_mode_backend import CuMemBackend\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "from vllm_toptheta.support import wakes_up_whole\n"
        "kept = []\n"
        "allocator.get_mem_allocator_instance = lambda: S(sleep=lambda offload_tags: kept.append(offload_tags))\n"
        "CuMemBackend().suspend(1); CuMemBackend().suspend(2)\n"
        "text = inspect.getsource(Worker.initialize_from_config)\n"
        "pool = text.rindex('memory_pool_context', 0, text.index('.initialize_kv_cache('))\n"
        "is_made_there = 'runtime' in text[pool:text.index('.initialize_kv_cache(')]\n"
        "print(wakes_up_whole(), all('runtime' in tags for tags in kept), is_made_there)\n"
    )
    whole = "0.26.0" not in release.files.name
    assert release.run(code) == f"{whole} {whole} {whole}"


def test_whether_images_can_be_left_out_is_told_by_vllms_file(release: Release) -> None:
    code = (
        "import inspect\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase as Base\n"
        "from vllm_toptheta.support import image_modalities, serves_text_alone\n"
        "def is_prefix(config, **known):\n"
        "    convertor = Base.__new__(Base)\n"
        "    convertor.hf_config = S(**config)\n"
        "    return convertor.is_mm_prefix_lm(**known)\n"
        "names = 'bagel gemma3 molmo2 moondream3 paligemma gemma3_text qwen2_5_vl idefics3'.split()\n"
        "configs = [{'model_type': name} for name in names]\n"
        "configs += [{**config, 'is_mm_prefix_lm': said} for config in configs for said in (False, True)]\n"
        "for config in configs:\n"
        "    assert is_prefix(config) == bool(image_modalities(config)), config\n"
        "can = 'supports_multimodal' in inspect.signature(Base.is_mm_prefix_lm).parameters\n"
        "if can:\n"
        "    assert not any(is_prefix(config, supports_multimodal=False) for config in configs)\n"
        "print(serves_text_alone(), can)\n"
    )
    can = "0.26.0" not in release.files.name
    assert release.run(code) == f"{can} {can}"


def test_pages_are_split_where_specs_say_how_many_rows_some_tokens_take(release: Release) -> None:
    """Whether vLLM's file says so; then by its own functions: 528 tokens, in pages of 16 with a row each."""
    can = "0.26.0" not in release.files.name
    code = "from vllm_toptheta.support import splits_pages\nprint(splits_pages())\n"
    assert release.run(code) == str(can)
    if not can:
        return
    code = (
        "import torch\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec\n"
        "from vllm.v1.worker.utils import select_common_block_size\n"
        "from vllm.v1.kv_cache_layout import KVCacheLayout\n"
        "from vllm.v1 import kv_cache_interface as interface\n"
        "from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend\n"
        "from vllm_toptheta.backend.gpu import GpuTopThetaBackend\n"
        "from vllm_toptheta.backend.pages import with_tail_rows\n"
        "plain = FullAttentionSpec(block_size=528, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)\n"
        "spec = with_tail_rows(plain)\n"
        "tokens = select_common_block_size(528, [GpuTopThetaBackend], [spec])\n"
        "strides = interface.compute_layout_strides(spec, 3, 1, KVCacheLayout.LBNHC, tokens)\n"
        "shape = interface.compute_layer_kv_cache_shape_bytes(spec, 3, tokens)\n"
        "print(tokens, spec.page_size_bytes - plain.page_size_bytes, shape, strides[1:])\n"
    )
    assert release.run(code) == f"16 {33 * 2 * 256} (99, 2, 17, 256) ({17 * 512}, 256, 512, 1)"


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1"])
def test_supported_versions(version: str) -> None:
    versions.check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_unless_allowed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    with pytest.raises(UnsupportedError, match=f"supports vLLM 0.26 to 0.33, this is {version}"):
        versions.check_version(version)
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    versions.check_version(version)
