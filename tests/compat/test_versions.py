"""Registration, parsing, pickling, page tails and batch slicing on the oldest and the newest supported vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.release import Release
from vllm_toptheta.backend import compat
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.settings import ALLOW_UNTESTED

pytestmark = pytest.mark.compat


REGISTER = "from vllm_toptheta.backend.plugin import register; register(); register()\n"


def test_the_files_are_those_of_that_version(release: Release) -> None:
    code = "import vllm, importlib.metadata as m; print(vllm.__file__, m.version('vllm'))"
    file, version = release.run(code).split()
    assert Path(file).parents[1] == release.files
    assert version.removesuffix("+cpu") in release.files.name


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


def test_pages_have_tails(release: Release) -> None:
    code = REGISTER + (
        "import torch\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.model_executor.layers.attention import Attention\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec\n"
        "from vllm_toptheta.backend.compat import install_page_tails\n"
        "plain = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)\n"
        "layer = Attention.__new__(Attention); torch.nn.Module.__init__(layer)\n"
        "layer.attn_backend = S(get_name=lambda: 'TOPTHETA', is_mla=lambda: False)\n"
        "layer.attn_type, layer.sliding_window, layer.kv_cache_dtype = 'decoder', None, 'auto'\n"
        "layer.num_kv_heads, layer.head_size, layer.head_size_v = 8, 128, 128\n"
        "layer.kv_cache_torch_dtype = torch.bfloat16\n"
        "install_page_tails(lambda config: config.code_bytes)\n"
        "install_page_tails(None)\n"
        "cache = S(block_size=16, cache_dtype='auto')\n"
        "for code_bytes in (0, 32):\n"
        "    padded = layer.get_kv_cache_spec(S(cache_config=cache, code_bytes=code_bytes))\n"
        "    print(padded.page_size_bytes - plain.page_size_bytes, end=' ')\n"
    )
    assert release.run(code) == f"{8 * 128 * 4} {8 * 128 * 4 + 8 * 16 * 32}"


def test_prefills_are_cut_off_a_mixed_batch(release: Release) -> None:
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


def test_workers_forget_what_warm_up_counted(release: Release) -> None:
    """Counters are made in inference mode, where newer versions profile; all versions warm up outside of it."""
    code = (
        "import torch\n"
        "from types import SimpleNamespace as S\n"
        "from vllm_toptheta.backend.worker import forget_warm_up\n"
        "from vllm_toptheta.telemetry.counters import LayerCounters\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "def warm_up(worker):\n"
        "    with torch.inference_mode():\n"
        "        counters.totals += 3\n"
        "    return 'warm'\n"
        "Worker.compile_or_warm_up_model = warm_up\n"
        "with torch.inference_mode():\n"
        "    counters = LayerCounters(0, [0], 2)\n"
        "impls = [S(layer_plan=S(counters=counters)), S(layer_plan=None)]\n"
        "layers = {str(i): S(impl=impl, backend=S(name='TOPTHETA')) for i, impl in enumerate(impls)}\n"
        "context = layers | {'linear': object(), 'other': S(backend=S(name='FLASH_ATTN'))}\n"
        "worker = S(vllm_config=S(compilation_config=S(static_forward_context=context)))\n"
        "forget_warm_up(); forget_warm_up()\n"
        "print(Worker.compile_or_warm_up_model(worker), counters.totals.tolist())\n"
    )
    assert release.run(code) == "warm [0, 0, 0, 0, 0]"


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


@pytest.mark.parametrize("is_v2", [False, True], ids=["V1 runner", "V2 runner"])
def test_runners_tell_who_stands_in_which_row(release: Release, is_v2: bool) -> None:
    code = (
        "import importlib, inspect\n"
        "from types import SimpleNamespace as S\n"
        "from vllm_toptheta.backend.compat import follow_batches\n"
        f"is_v2 = {is_v2}\n"
        "module, method = (('vllm.v1.worker.gpu.model_runner', 'prepare_inputs') if is_v2\n"
        "                  else ('vllm.v1.worker.gpu_model_runner', '_prepare_inputs'))\n"
        "runner_class = importlib.import_module(module).GPUModelRunner\n"
        "theirs = getattr(runner_class, method)\n"
        "assert list(inspect.signature(theirs).parameters)[:2] == ['self', 'scheduler_output']\n"
        "assert f'self.{method}(' in inspect.getsource(runner_class.execute_model)\n"
        "setattr(runner_class, method, lambda self, scheduler_output, *_: S(req_ids=['b', 'a']) if is_v2 else ())\n"
        "told = []\n"
        "for _ in range(2):  # once for each group of layers\n"
        "    follow_batches(S(use_v2_model_runner=is_v2), lambda *arguments: told.append(arguments[1:]))\n"
        "runner = S(requests={'a': 1}, input_batch=S(req_ids=['b', 'a']), req_states=S(req_id_to_index={'a': 1}))\n"
        "getattr(runner_class, method)(runner, S(scheduled_new_reqs=['new']), None)\n"
        "print(told)\n"
    )
    assert release.run(code) == "[(['new'], {'a': 1}, ['b', 'a'])]"


def test_runners_keep_what_is_looked_for(release: Release) -> None:
    """Names in the sources, of attributes that only a runner with a device has."""
    v1 = (release.files / "vllm/v1/worker/gpu_model_runner.py").read_text()
    v2 = (release.files / "vllm/v1/worker/gpu/model_runner.py").read_text()
    states = (release.files / "vllm/v1/worker/gpu/states.py").read_text()
    output = (release.files / "vllm/v1/core/sched/output.py").read_text()
    assert "self.requests: dict[str, CachedRequestState] = {}" in v1
    assert "req_ids = self.input_batch.req_ids" in v1
    assert "self.req_id_to_index: dict[str, int] = {}" in states
    assert "req_ids=req_ids," in v2
    for field in ("req_id: str", "prompt_token_ids: ", "sampling_params: ", "prefill_token_ids: "):
        assert f"    {field}" in output


def test_requests_are_checked_where_they_come_in(release: Release) -> None:
    code = REGISTER + (
        "from types import SimpleNamespace as S\n"
        "from vllm import SamplingParams\n"
        "from vllm.exceptions import VLLMValidationError\n"
        "from vllm_toptheta.backend import admission\n"
        "from vllm_toptheta.backend.levels import Levels\n"
        "admission.install(lambda config: config == 'ours'); admission.install(None)\n"
        "from vllm.v1.engine.async_llm import AsyncLLM\n"
        "from vllm.v1.engine.input_processor import InputProcessor\n"
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest\n"
        "processor = S(vllm_config='ours', toptheta_levels=Levels(None))\n"
        "bad = SamplingParams(extra_args={'toptheta': 'k:64'})\n"
        "refused = []\n"
        "def attempt(call):\n"
        "    try:\n"
        "        call()\n"
        "    except VLLMValidationError as error:\n"
        "        refused.append('can ask for dense, not for' in str(error) or 'beam search' in str(error))\n"
        "attempt(lambda: InputProcessor._validate_params(processor, bad, ()))\n"
        "attempt(lambda: AsyncLLM.generate(S(input_processor=processor), 'prompt', bad, 'id'))\n"
        "engine = S(input_processor=processor)\n"
        "attempt(lambda: AsyncLLM.generate(engine, prompt='x', sampling_params=bad, request_id='id'))\n"
        "asked = CompletionRequest(prompt='x', vllm_xargs={'toptheta': 'dense'}, use_beam_search=True)\n"
        "attempt(lambda: asked.to_beam_search_params(4, {}))\n"
        "CompletionRequest(prompt='x', use_beam_search=True).to_beam_search_params(4, {})\n"
        "good = SamplingParams(extra_args={'toptheta': 'dense', 'other': 1})\n"
        "AsyncLLM.generate(engine, 'prompt', good, 'id')\n"
        "AsyncLLM.generate(S(input_processor=S(vllm_config='another')), 'prompt', bad, 'id')\n"
        "print(refused)\n"
    )
    assert release.run(code) == "[True, True, True, True]"
