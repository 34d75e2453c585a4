"""Registration, parsing, pickling, page tails and batch slicing on the oldest and the newest supported vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_toptheta.backend import compat
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.settings import ALLOW_UNTESTED

pytestmark = pytest.mark.compat


def run(vllm_files: Path, code: str) -> str:
    """Run `code` in a process whose vLLM is `vllm_files`; its last line of output."""
    environment = {**os.environ, "PYTHONPATH": str(vllm_files), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.strip().splitlines()[-1]


REGISTER = "from vllm_toptheta.backend.plugin import register; register(); register()\n"


def test_the_files_are_those_of_that_version(vllm_files: Path) -> None:
    code = "import vllm, importlib.metadata as m; print(vllm.__file__, m.version('vllm'))"
    file, version = run(vllm_files, code).split()
    assert Path(file).parents[1] == vllm_files
    assert version.removesuffix("+cpu") in vllm_files.name


@pytest.mark.parametrize("name", ["toptheta", "TopTheta"])
def test_the_name_is_parsed(vllm_files: Path, name: str) -> None:
    code = REGISTER + f"from vllm.config import AttentionConfig; print(AttentionConfig(backend={name!r}).backend.name)"
    assert run(vllm_files, code) == "TOPTHETA"


def test_the_member_crosses_processes(vllm_files: Path) -> None:
    code = REGISTER + (
        "import pickle, subprocess, sys\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "data = pickle.dumps([Backends.TOPTHETA, Backends.FLASH_ATTN])\n"
        "code = 'import pickle, sys; print([m.name for m in pickle.loads(sys.stdin.buffer.read())])'\n"
        "print(subprocess.run([sys.executable, '-c', code], input=data, capture_output=True).stdout.decode())\n"
    )
    assert run(vllm_files, code) == "['TOPTHETA', 'FLASH_ATTN']"


def test_pages_have_tails(vllm_files: Path) -> None:
    code = REGISTER + (
        "import torch\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.model_executor.layers.attention import Attention\n"
        "from vllm.v1.attention.backend import AttentionBackend\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec\n"
        "from vllm_toptheta.backend.pages import with_tail\n"
        "plain = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)\n"
        "if hasattr(AttentionBackend, 'customize_spec'):\n"
        "    padded = with_tail(plain)\n"
        "else:\n"
        "    layer = Attention.__new__(Attention); torch.nn.Module.__init__(layer)\n"
        "    layer.attn_backend = S(get_name=lambda: 'TOPTHETA', is_mla=lambda: False)\n"
        "    layer.attn_type, layer.sliding_window, layer.kv_cache_dtype = 'decoder', None, 'auto'\n"
        "    layer.num_kv_heads, layer.head_size, layer.head_size_v = 8, 128, 128\n"
        "    layer.kv_cache_torch_dtype = torch.bfloat16\n"
        "    padded = layer.get_kv_cache_spec(S(cache_config=S(block_size=16, cache_dtype='auto')))\n"
        "print(padded.page_size_bytes - plain.page_size_bytes)\n"
    )
    assert run(vllm_files, code) == str(8 * 128 * 4)


def test_prefills_are_cut_off_a_mixed_batch(vllm_files: Path) -> None:
    code = (
        "import torch\n"
        "from vllm.v1.attention.backend import CommonAttentionMetadata\n"
        "from vllm_toptheta.backend.compat import without_decodes\n"
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
    assert run(vllm_files, code) == "[0, 5, 14] [30, 40] 2 14 [6, 9] 2 [True, True]"


def test_the_gpu_classes_import_and_fit(vllm_files: Path) -> None:
    code = REGISTER + (
        "import inspect\n"
        "from vllm_toptheta.backend import gpu\n"
        "from vllm.v1.attention.backends import flash_attn\n"
        "assert gpu.GpuTopThetaBackend.get_name() == 'TOPTHETA'\n"
        "for ours, theirs in ((gpu.GpuTopThetaImpl, flash_attn.FlashAttentionImpl),\n"
        "                     (gpu.GpuMetadataBuilder, flash_attn.FlashAttentionMetadataBuilder)):\n"
        "    for name in ('forward', 'build'):\n"
        "        if hasattr(theirs, name):\n"
        "            expected = list(inspect.signature(getattr(theirs, name)).parameters)\n"
        "            assert list(inspect.signature(getattr(ours, name)).parameters) == expected, name\n"
        "print(gpu.GpuMetadataBuilder._cudagraph_support.name)\n"
    )
    assert run(vllm_files, code) == "UNIFORM_SINGLE_TOKEN_DECODE"


def test_workers_forget_what_warm_up_counted(vllm_files: Path) -> None:
    code = (
        "from vllm_toptheta.backend.worker import forget_warm_up\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "forget_warm_up()\n"
        "print(Worker.compile_or_warm_up_model.__module__)\n"
    )
    assert run(vllm_files, code) == "vllm_toptheta.backend.worker"


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1"])
def test_supported_versions(version: str) -> None:
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_unless_allowed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    with pytest.raises(UnsupportedError, match=f"supports vLLM 0.26 to 0.33, this is {version}"):
        compat.check_version(version)
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    compat.check_version(version)
