"""Every hook is installed twice and then called, on the oldest, the newest and the installed vLLM."""

from __future__ import annotations

import pytest

from tests.compat.release import Release

pytestmark = pytest.mark.compat

# layers of ours and others, as vLLM keeps them in its configuration
CONFIG = (
    "import torch\n"
    "from types import SimpleNamespace as S\n"
    "def config_of(*impls, **fields):\n"
    "    layers = {str(i): S(impl=impl, backend=S(name='TOPTHETA')) for i, impl in enumerate(impls)}\n"
    "    layers |= {'linear': object(), 'other': S(backend=S(name='FLASH_ATTN'))}\n"
    "    return S(compilation_config=S(static_forward_context=layers), **fields)\n"
)


def test_the_name_is_a_member_of_the_enum(release: Release) -> None:
    code = (
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "from vllm_toptheta.backend.hooks import backend_name\n"
        "backend_name.install(); backend_name.install()\n"
        "member = Backends.TOPTHETA\n"
        "print(member.name, member.get_path(), [one.name for one in Backends].count('TOPTHETA'))\n"
    )
    assert release.run(code) == "TOPTHETA vllm_toptheta.backend.cpu.CpuTopThetaBackend 1"


def test_configurations_are_checked(release: Release) -> None:
    code = (
        "from types import SimpleNamespace as S\n"
        "from vllm.platforms import current_platform\n"
        "from vllm_toptheta.backend import support_checks\n"
        "from vllm_toptheta.backend.hooks import config_check, request_validation\n"
        "from vllm_toptheta.backend.plan import Plan\n"
        "done, platform = [], type(current_platform)\n"
        "platform.check_and_update_config = classmethod(lambda cls, config: done.append((cls.__name__, 'theirs')))\n"
        "config_check.install(); config_check.install()\n"
        "support_checks.check_engine = lambda config: done.append('engine')\n"
        "support_checks.check_plan = lambda plan, config: done.append(plan)\n"
        "request_validation.install = lambda: done.append('requests')\n"
        "Plan.resolve = lambda config: 'plan'\n"
        "for name in ('FLASH_ATTN', 'TOPTHETA'):\n"
        "    config = S(attention_config=S(backend=S(name=name)), model_config='model')\n"
        "    current_platform.check_and_update_config(config)\n"
        "print(done)\n"
    )
    theirs = "('CpuPlatform', 'theirs')"
    assert release.run(code) == f"[{theirs}, {theirs}, 'engine', 'plan', 'requests']"


def test_cpus_select_it(release: Release) -> None:
    code = (
        "from vllm.platforms import current_platform\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "from vllm_toptheta.backend import support_checks\n"
        "from vllm_toptheta.backend.hooks import backend_name, cpu_selection\n"
        "checked = []\n"
        "support_checks.check_layer = lambda backend, config: checked.append((backend.get_name(), config))\n"
        "theirs = classmethod(lambda cls, selected, config, num_heads=None: f'{cls.__name__} {selected} {num_heads}')\n"
        "type(current_platform).get_attn_backend_cls = theirs\n"
        "backend_name.install()\n"
        "cpu_selection.install(); cpu_selection.install()\n"
        "select = current_platform.get_attn_backend_cls\n"
        "assert select(None, 'layer', num_heads=8) == 'CpuPlatform None 8'\n"
        "assert select(Backends.TOPTHETA, 'layer', num_heads=8).endswith('CpuTopThetaBackend')\n"
        "print(checked)\n"
    )
    assert release.run(code) == "[('TOPTHETA', 'layer')]"


def test_pages_have_tails(release: Release) -> None:
    code = (
        "import torch\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.model_executor.layers.attention import Attention\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec\n"
        "from vllm_toptheta.backend.hooks import page_tails\n"
        "from vllm_toptheta.backend.plan import Plan\n"
        "plain = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)\n"
        "layer = Attention.__new__(Attention); torch.nn.Module.__init__(layer)\n"
        "layer.attn_type, layer.sliding_window, layer.kv_cache_dtype = 'decoder', None, 'auto'\n"
        "layer.num_kv_heads, layer.head_size, layer.head_size_v = 8, 128, 128\n"
        "layer.kv_cache_torch_dtype = torch.bfloat16\n"
        "page_tails.install(); page_tails.install()\n"
        "Plan.code_bytes_of = lambda config: config.code_bytes\n"
        "cache = S(block_size=16, cache_dtype='auto', skip_page_size_padded=None)\n"
        "as_it_is = {'is_mla': lambda: False, 'customize_spec': lambda spec: spec}\n"
        "blocks = {'get_supported_kernel_block_sizes': lambda *spec: [16]}\n"
        "def bytes_of(name, kind, window, code_bytes):\n"
        "    layer.attn_backend = S(get_name=lambda: name, **as_it_is, **blocks)\n"
        "    layer.sliding_window = window\n"
        "    model = S(hf_text_config=S(to_dict=lambda: {'model_type': kind}))\n"
        "    config = S(cache_config=cache, model_config=model, code_bytes=code_bytes, speculative_config=None)\n"
        "    return layer.get_kv_cache_spec(config).page_size_bytes - plain.page_size_bytes\n"
        "kinds, windows, sizes = ('llama', 'gemma4_text'), (None, 48), (0, 32)\n"
        "asked = [(kind, window, size) for kind in kinds for window in windows for size in sizes]\n"
        "print([bytes_of('TOPTHETA', *one) for one in asked], bytes_of('FLASH_ATTN', 'llama', None, 32))\n"
    )
    tails = [8 * 128 * 4, 8 * 128 * 4 + 8 * 16 * 32]
    # pages of layers with a window get the same length by vLLM where their heads are others
    assert release.run(code) == f"{[*tails, *tails, *tails, 0, 0]} 0"


def test_nixl_is_shown_keys_and_values(release: Release) -> None:
    code = (
        "import inspect, torch\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, connector\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec\n"
        "from vllm_toptheta.backend.hooks import nixl_pages\n"
        "theirs, shown = connector.NixlBaseConnector.register_kv_caches, {}\n"
        "assert list(inspect.signature(theirs).parameters) == ['self', 'kv_caches']\n"
        "assert 'self._layer_specs.get(layer_name)' in inspect.getsource(base_worker)\n"
        "nixl_pages.install(); nixl_pages.install()\n"
        "assert connector.NixlBaseConnector.register_kv_caches.__wrapped__ is theirs\n"
        "plain = dict(block_size=4, num_kv_heads=2, head_size=2, dtype=torch.float32)\n"
        "specs = {i: FullAttentionSpec(**plain, page_size_padded=160) for i in range(2)}\n"
        "nixl = connector.NixlConnector.__new__(connector.NixlConnector)\n"
        "nixl.connector_worker = S(register_kv_caches=shown.update, _layer_specs=specs)\n"
        "memory = torch.arange(2 * 5 * 40.)  # layers of 5 pages of 40 numbers, 8 of which nobody sees\n"
        "layers = {i: memory.as_strided((5, 2, 4, 4), (40, 16, 4, 1), 200 * i) for i in range(2)}\n"
        "nixl.register_kv_caches(layers)\n"
        "assert all(shown[i].data_ptr() == layers[i].data_ptr() for i in layers)\n"
        "lengths = {spec.page_size_bytes for spec in nixl.connector_worker._layer_specs.values()}\n"
        "print(lengths, {(*pages.shape, *pages.stride()) for pages in shown.values()})\n"
        "alone = torch.arange(5 * 40.).as_strided((5, 2, 4, 4), (40, 16, 4, 1))\n"
        "nixl.register_kv_caches({0: alone})\n"
        "assert shown[0] is alone and alone[0].nbytes == 128\n"
    )
    assert release.run(code) == "{128} {(5, 1, 1, 40, 40, 40, 40, 1)}"


def test_nixl_takes_no_pages_of_another_length(release: Release) -> None:
    code = (
        "import inspect\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker as Worker\n"
        "from vllm_toptheta.backend.hooks import nixl_pages\n"
        "names = list(inspect.signature(Worker._validate_remote_agent_handshake).parameters)\n"
        "assert names[:3] == ['self', 'nixl_agent_meta', 'remote_tp_size'], names\n"
        "nixl_pages.install()\n"
        "worker = Worker.__new__(Worker)\n"
        "worker.block_size = 32\n"
        "try:\n"
        "    worker._validate_remote_agent_handshake(S(block_size=16), 2)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert release.run(code) == "--block-size: 32 here, 16 in the engine that read the prompt. Give both the same"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_layer_of_chunks_is_refused_whatever_config_json_says(release: Release, platform: str) -> None:
    builder = {"cpu": "CpuMetadataBuilder", "gpu": "GpuMetadataBuilder"}[platform]
    code = CONFIG + (
        "import importlib\n"
        "from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention\n"
        "from vllm.v1.attention.backend import AttentionMetadataBuilder\n"
        "from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder\n"
        "from vllm_toptheta.backend.plan import Plan\n"
        "from vllm_toptheta.errors import UnsupportedError\n"
        f"module = importlib.import_module('vllm_toptheta.backend.{platform}')\n"
        "layer = ChunkedLocalAttention.__new__(ChunkedLocalAttention); torch.nn.Module.__init__(layer)\n"
        "layer.attention_chunk_size, layer.num_kv_heads, layer.head_size = 64, 8, 128\n"
        "layer.kv_cache_dtype, layer.kv_cache_torch_dtype = 'auto', torch.bfloat16\n"
        "spec = layer.get_kv_cache_spec(S(cache_config=S(block_size=16, cache_dtype='auto')))\n"
        "assert spec.attention_chunk_size == 64  # the attribute is what vLLM goes by\n"
        "Plan.resolve = classmethod(lambda cls, config: S(heavy=None, choices=None, log=lambda **_: None,\n"
        "                                                 code_bytes=0))\n"
        "FlashAttentionMetadataBuilder.__init__ = AttentionMetadataBuilder.__init__\n"
        f"builder = module.{builder}\n"
        "builder._init_reorder_batch_threshold = lambda *_, **__: None\n"
        "module.get_tensor_model_parallel_rank = lambda: 1\n"
        "module.request_offsets = lambda *_: None\n"
        "layers = {'model.layers.1.attn': layer}\n"
        "config = S(compilation_config=S(static_forward_context=layers), scheduler_config=S(max_num_seqs=1),\n"
        "           speculative_config=None)\n"
        "try:\n"
        "    builder(spec, list(layers), config, torch.device('cpu'))\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    said = release.run(code)
    assert said.startswith("layer model.layers.1.attn: layers that attend within chunks are not supported")
    assert said.endswith("Serve this model without --attention-backend toptheta.")


def test_workers_forget_what_warm_up_counted(release: Release) -> None:
    """Counters are made in inference mode, where newer versions profile; all versions warm up outside of it."""
    code = CONFIG + (
        "from vllm_toptheta.backend.hooks import warm_up\n"
        "from vllm_toptheta.backend.counters import LayerCounters\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "def warms_up(worker):\n"
        "    with torch.inference_mode():\n"
        "        counters.buffers.totals.add_(3)\n"
        "    return 'warm'\n"
        "Worker.compile_or_warm_up_model = warms_up\n"
        "with torch.inference_mode():\n"
        "    counters = LayerCounters(0, [0], 2)\n"
        "worker = S(vllm_config=config_of(S(layer_plan=S(counters=counters)), S(layer_plan=None)))\n"
        "warm_up.install(); warm_up.install()\n"
        "print(Worker.compile_or_warm_up_model(worker), counters.buffers.totals.tolist())\n"
    )
    assert release.run(code) == "warm [0, 0, 0, 0, 0]"


def test_the_hook_for_warming_up_finds_its_method(release: Release) -> None:
    code = (
        "import inspect\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "from vllm_toptheta.backend.hooks import warm_up\n"
        "theirs = Worker.compile_or_warm_up_model\n"
        "warm_up.install(); warm_up.install()\n"
        "assert Worker.compile_or_warm_up_model.__wrapped__ is theirs\n"
        "print(list(inspect.signature(theirs).parameters))\n"
    )
    assert release.run(code) == "['self']"


def test_workers_answer_what_they_counted(release: Release) -> None:
    """Counters are made in inference mode, and asked for outside of it."""
    code = CONFIG + (
        "from vllm.v1.worker.worker_base import WorkerBase\n"
        "from vllm_toptheta.backend.hooks import worker_stats\n"
        "from vllm_toptheta.backend.request_choices import RequestChoices\n"
        "from vllm_toptheta.backend.plan import Plan\n"
        "from vllm_toptheta.backend.requests import RequestOffsets\n"
        "from vllm_toptheta.kernels.cpu.scratch import Counted\n"
        "from vllm_toptheta.settings import Settings\n"
        "from vllm_toptheta.store import Architecture\n"
        "from vllm_toptheta.backend.counters import LayerCounters\n"
        "from vllm_toptheta.telemetry.stats import RankStats\n"
        "worker_stats.install(); worker_stats.install()\n"
        "shape = Architecture(num_layers=2, num_heads=2, num_kv_heads=1, head_size=64, rope={})\n"
        "plan = Plan(Settings.load({}), None, None, 'a test', frozenset(), shape, RequestChoices(None))\n"
        "with torch.inference_mode():\n"
        "    counters, requests = LayerCounters(1, [0], 2), RequestOffsets(plan.choices, 2)\n"
        "    one, read = torch.ones(1, 1, dtype=torch.int64), torch.tensor([[4]])\n"
        "    step = Counted(torch.tensor([1, 0, 9, 1, 0]), one, read, torch.zeros(1, 2), read)\n"
        "    counters.scratch.add(counters.buffers, step)\n"
        "impls = [S(plan=plan, layer_plan=S(counters=counters, guard=None, watch=None), requests=requests),\n"
        "         S(plan=None, layer_plan=None, requests=None)]\n"
        "rest = {'cache_config': S(cache_dtype='auto'), 'model_config': S(dtype=torch.float16)}\n"
        "worker = WorkerBase.__new__(WorkerBase)\n"
        "worker.vllm_config = config_of()\n"
        "assert worker.toptheta_stats() is None\n"
        "worker.vllm_config = config_of(*impls, **rest)\n"
        "stats = RankStats.model_validate(worker.toptheta_stats())\n"
        "print(stats.decode_tokens, stats.layers[0].rows_read, stats.value_row_bytes)\n"
    )
    assert release.run(code) == "1 4 128"


def test_a_worker_that_sleeps_answers_what_it_had_counted(release: Release) -> None:
    code = (
        "import inspect\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "from vllm_toptheta.backend.hooks import sleep, worker_stats\n"
        "theirs = Worker.sleep, Worker.wake_up\n"
        "assert [list(inspect.signature(one).parameters) for one in theirs] == [['self', 'level'], ['self', 'tags']]\n"
        "done = []\n"
        "Worker.sleep = lambda self, level=1: done.append(level)\n"
        "Worker.wake_up = lambda self, tags=None: done.append(tags)\n"
        "def report(config):\n"
        "    assert not config['asleep'], 'the memory is away'\n"
        "    return {'tokens': config['tokens']}\n"
        "sleep.rank_report = worker_stats.rank_report = report\n"
        "for _ in range(2):\n"
        "    sleep.install(); worker_stats.install()\n"
        "worker = Worker.__new__(Worker)\n"
        "worker.vllm_config = config = {'asleep': False, 'tokens': 3}\n"
        "answers = [worker.toptheta_stats()]\n"
        "config['tokens'] = 5\n"
        "worker.sleep(2)\n"
        "config['asleep'] = True\n"
        "answers.append(worker.toptheta_stats())\n"
        "worker.sleep(level=1)\n"
        "answers.append(worker.toptheta_stats())\n"
        "config['asleep'] = False\n"
        "worker.wake_up(tags=['weights'])\n"
        "config['tokens'] = 7\n"
        "answers.append(worker.toptheta_stats())\n"
        "print([answer['tokens'] for answer in answers], done)\n"
    )
    assert release.run(code) == "[3, 5, 5, 7] [2, 1, ['weights']]"


@pytest.mark.parametrize("is_v2", [False, True], ids=["V1 runner", "V2 runner"])
def test_runners_tell_who_stands_in_which_row(release: Release, is_v2: bool) -> None:
    code = CONFIG + (
        "import importlib, inspect\n"
        "from vllm.v1.core.sched.output import CachedRequestData\n"
        "from vllm_toptheta.backend.hooks import batch_rows\n"
        "from vllm_toptheta.backend.request_choices import RequestChoices\n"
        "from vllm_toptheta.backend.requests import request_offsets\n"
        f"is_v2 = {is_v2}\n"
        "module, method = (('vllm.v1.worker.gpu.model_runner', 'prepare_inputs') if is_v2\n"
        "                  else ('vllm.v1.worker.gpu_model_runner', '_prepare_inputs'))\n"
        "runner_class = importlib.import_module(module).GPUModelRunner\n"
        "theirs = getattr(runner_class, method)\n"
        "assert list(inspect.signature(theirs).parameters)[:2] == ['self', 'scheduler_output']\n"
        "assert f'self.{method}(' in inspect.getsource(runner_class.execute_model)\n"
        "rows = ['b', 'c', 'a']\n"
        "setattr(runner_class, method, lambda self, scheduler_output, *_: S(req_ids=rows) if is_v2 else ())\n"
        "impls = [S(requests=None), S(requests=None)]\n"
        "config = config_of(*impls, use_v2_model_runner=is_v2)\n"
        "with torch.inference_mode():\n"
        "    impls[1].requests = request_offsets(RequestChoices(None), config, 3)\n"
        "assert request_offsets(RequestChoices(None), config, 3) is impls[1].requests  # of another group of layers\n"
        "batch_rows.install(config)\n"
        "runner = S(vllm_config=config, requests={'a': 1}, input_batch=S(req_ids=rows),\n"
        "           req_states=S(req_id_to_index={'a': 1}))\n"
        "new = S(req_id='a', prompt_token_ids=[1], sampling_params=S(extra_args={'toptheta': 'dense'}))\n"
        "cached = CachedRequestData.make_empty()\n"
        "cached.resumed_req_ids.add('b')\n"
        "step = S(scheduled_new_reqs=[new], scheduled_cached_reqs=cached)\n"
        "getattr(runner_class, method)(runner, step, None)\n"
        "found = impls[1].requests\n"
        "print(found.offsets.tolist(), dict(found.counts), found.arrived_rows)\n"
    )
    assert release.run(code) == "[0.0, 0.0, -inf] {'dense': 1} [0, 2]"


def test_engines_draft_with_the_model_that_they_serve(release: Release) -> None:
    code = (
        "import inspect\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.v1.worker.worker_base import WorkerBase\n"
        "import vllm.v1.worker.gpu_model_runner as runner\n"
        "from vllm_toptheta.backend.hooks import self_drafts\n"
        "made, theirs = [], runner.DraftModelProposer\n"
        "assert 'DraftModelProposer(' in inspect.getsource(runner.GPUModelRunner.__init__)\n"
        "assert 'self.create_speculative_config(' in inspect.getsource(EngineArgs.create_engine_config)\n"
        "assert {'draft_sample_method', 'num_speculative_tokens'} <= set(\n"
        "    inspect.signature(__import__('vllm.config').config.SpeculativeConfig).parameters)\n"
        "def create(args, **named):\n"
        "    made.append(args.speculative_config)\n"
        "    return S(target_model_config='served', draft_model_config='read again')\n"
        "EngineArgs.create_speculative_config = create\n"
        "WorkerBase.__init__ = lambda worker, vllm_config, *a, **named: None\n"
        "self_drafts.install(); self_drafts.install()\n"
        "def start(name, options):\n"
        "    args = S(attention_backend=name, attention_config=S(backend=None), model='m', speculative_config=None,\n"
        "             revision='r', code_revision=None, additional_config={'toptheta': options})\n"
        "    config = EngineArgs.create_speculative_config(\n"
        "        args, target_model_config=None, target_parallel_config=None)\n"
        "    assert config.draft_model_config == ('served' if made[-1] else 'read again')\n"
        "    assert args.speculative_config is None\n"
        "    WorkerBase(S(attention_config=S(backend=S(name=name.upper())), model_config='m', speculative_config=1,\n"
        "                 additional_config=args.additional_config, use_v2_model_runner=False), 0, 0, '')\n"
        "    return runner.DraftModelProposer\n"
        "lossless = {'lossless': True, 'draft_tokens': 3}\n"
        "assert start('toptheta', {}) is start('flash_attn', lossless) is theirs\n"
        "ours = start('toptheta', lossless)\n"
        "assert issubclass(ours, theirs) and ours is not theirs\n"
        "for name in ('__init__', 'propose', 'prepare_next_token_ids_padded', 'load_model',\n"
        "             'initialize_attn_backend'):\n"
        "    known = [list(inspect.signature(getattr(one, name)).parameters) for one in (ours, theirs)]\n"
        "    assert known[0] == known[1], known\n"
        "assert {'_sample_draft_tokens', '_sample_from_logits'} <= set(dir(theirs))\n"
        "assert '_sample_from_logits(' in inspect.getsource(theirs._sample_draft_tokens)\n"
        "print(made)\n"
    )
    ours = {
        "method": "draft_model",
        "model": "m",
        "revision": "r",
        "code_revision": None,
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    assert release.run(code) == str([None, None, ours])


def test_the_v2_runner_drafts_with_the_model_that_it_serves(release: Release) -> None:
    if not (release.files / "vllm/v1/worker/gpu/spec_decode/target_dependent_ar").is_dir():
        pytest.skip("drafts by models are vLLM's V1 runner's, so lossless is refused on GPUs")
    code = (
        "import inspect\n"
        "from types import SimpleNamespace as S\n"
        "import vllm.v1.worker.gpu.model_runner as runner\n"
        "from vllm.v1.worker.gpu import attn_utils, block_table, cudagraph_utils, input_batch\n"
        "from vllm.v1.worker.worker_base import WorkerBase\n"
        "from vllm_toptheta.backend.hooks import self_drafts\n"
        "from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator\n"
        "AR = speculator.TargetDependentARSpeculator\n"
        "assert 'self.speculator = init_speculator(' in inspect.getsource(runner.GPUModelRunner.__init__)\n"
        "WorkerBase.__init__ = lambda worker, vllm_config, *a, **named: None\n"
        "self_drafts.install()\n"
        "WorkerBase(S(attention_config=S(backend=S(name='TOPTHETA')), model_config='m', speculative_config=1,\n"
        "             additional_config={'toptheta': {'lossless': True}}, use_v2_model_runner=True), 0, 0, '')\n"
        "from vllm_toptheta.backend.drafts.v2_runner import SelfSpeculator as ours\n"
        "ours.__init__ = lambda *args: print(args[1:])\n"
        "runner.init_speculator('config', 'device', 'states')\n"
        "for name in ('load_draft_model', 'init_cudagraph_manager', 'capture', 'propose'):\n"
        "    known = [list(inspect.signature(getattr(one, name)).parameters) for one in (ours, AR)]\n"
        "    assert known[0] == known[1], (name, known)\n"
        "def takes(function, *names):\n"
        "    assert set(names) <= set(inspect.signature(function).parameters), (function, names)\n"
        "takes(AR.set_attn, 'model_state', 'kv_cache_config')\n"
        "takes(AR._build_uniform_attn_metadata, 'batch_desc', 'num_reqs', 'num_query_per_req', 'step',\n"
        "      'seq_lens_cpu_upper_bound')\n"
        "takes(AR._copy_request_inputs, 'num_reqs', 'idx_mapping', 'temperature', 'seeds', 'dummy_run')\n"
        "takes(cudagraph_utils.CudaGraphManager.dispatch, 'num_reqs', 'num_tokens', 'uniform_token_count',\n"
        "      'num_active_loras')\n"
        "drawn = ['hidden_states', 'sample_src_positions', 'idx_mapping', 'temperature', 'seeds', 'draft_step',\n"
        "         'draft_logits']\n"
        "assert list(inspect.signature(AR.sample_draft).parameters)[1:8] == drawn\n"
        "slots = inspect.signature(block_table.BlockTables.compute_slot_mappings).parameters\n"
        "assert list(slots)[1:5] == ['idx_mapping', 'query_start_loc', 'positions', 'num_tokens_padded'], list(slots)\n"
        "assert list(inspect.signature(attn_utils.build_slot_mappings_by_layer).parameters) == [\n"
        "    'slot_mappings', 'kv_cache_config']\n"
        "assert ours.num_extra_query_per_req == 0\n"
    )
    assert release.run(code) == "('config', 'device')"


def test_the_scheduler_drafts_as_many_as_were_fastest(release: Release) -> None:
    code = (
        "import inspect\n"
        "from types import SimpleNamespace as S\n"
        "from vllm.v1.core.sched.scheduler import Scheduler\n"
        "from vllm_toptheta.backend.drafts.length import DraftLength\n"
        "from vllm.config import SpeculativeConfig\n"
        "from vllm_toptheta.backend.hooks import draft_length\n"
        "for name, first in (('__init__', ['vllm_config']),\n"
        "                    ('update_from_output', ['scheduler_output', 'model_runner_output'])):\n"
        "    assert list(inspect.signature(getattr(Scheduler, name)).parameters)[1:len(first) + 1] == first\n"
        "(table,) = draft_length.numbers(8)\n"
        "assert table in inspect.signature(SpeculativeConfig).parameters\n"
        "from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup as build\n"
        "for most_seqs, tried in ((1, {8}), (2, {8, 0}), (256, {8, 4, 0})):\n"
        "    assert set(build(*draft_length.numbers(8).values(), most_seqs, 8)[1:]) == tried\n"
        "assert 'self.dynamic_sd_lookup[' in inspect.getsource(Scheduler.schedule)\n"
        "def init(scheduler, vllm_config): scheduler.dynamic_sd_lookup = [0, 8, 0, 4, 8]\n"
        "Scheduler.__init__ = init\n"
        "Scheduler.update_from_output = lambda *args: scheduler.requests.clear()\n"
        "draft_length.install(); draft_length.install()\n"
        "def start(options, name='TOPTHETA'):\n"
        "    return Scheduler(S(attention_config=S(backend=S(name=name)), model_config='m',\n"
        "                       additional_config={'toptheta': options}))\n"
        "auto = {'lossless': True}\n"
        "for scheduler in (start(auto, 'FLASH_ATTN'), start({}), start({**auto, 'draft_tokens': 6})):\n"
        "    assert scheduler.dynamic_sd_lookup == [0, 8, 0, 4, 8]\n"
        "scheduler = start(auto)\n"
        "assert isinstance(scheduler.dynamic_sd_lookup, DraftLength) and scheduler.dynamic_sd_lookup[3] == 8\n"
        "scheduler.num_spec_tokens, seen = 8, []\n"
        "DraftLength.step = lambda length, *args, is_plain: seen.append((*args, is_plain))\n"
        "def step(scheduled, sampled, new=()):\n"
        "    scheduler.requests = {name: S(num_computed_tokens=100) for name in 'ab'}\n"
        "    Scheduler.update_from_output(scheduler, S(num_scheduled_tokens=scheduled, scheduled_new_reqs=new),\n"
        "                                 S(sampled_token_ids=sampled))\n"
        "step({'a': 9, 'b': 1}, [[1, 2, 3], [4]])\n"
        "step({'a': 9, 'gone': 9}, [[1], []])\n"
        "step({'a': 10}, None)\n"
        "step({'a': 9}, [[1]], new=['request'])\n"
        "step({}, [])\n"
        "print(seen)\n"
    )
    told = [(2, 200, 4, True), (2, 100, 1, True), (1, 100, 0, False), (1, 100, 1, False), (0, 0, 0, True)]
    assert release.run(code) == str(told)


def test_what_is_refused_of_drafts_has_the_names_and_values_of_vllms(release: Release) -> None:
    code = (
        "import dataclasses\n"
        "from vllm.config import SpeculativeConfig\n"
        "from vllm_toptheta.support.speculation import _UNTRIED, BY_MODELS, MODELLESS\n"
        "from vllm.config.speculative import SpeculativeMethod\n"
        "usual = {field.name: getattr(field.default, 'default', field.default)\n"
        "         for field in dataclasses.fields(SpeculativeConfig)}\n"
        "assert {'method', 'model', 'revision', 'attention_backend', 'draft_model_config'} <= set(usual)\n"
        "assert all(usual[name] == value for name, value in _UNTRIED.items() if name in usual)\n"
        "assert all(f\"'{method}'\" in str(SpeculativeMethod) for method in (*BY_MODELS, *MODELLESS))\n"
        "print(set(_UNTRIED) - set(usual) <= {'disable_eagle_block_drop', 'enable_adaptive_verification'})\n"
    )
    assert release.run(code) == "True"


def test_drafts_are_verified_by_the_options_of_their_requests(release: Release) -> None:
    code = (
        "import inspect, torch\n"
        "from vllm.v1.sample import rejection_sampler\n"
        "from vllm_toptheta.backend.hooks import expanded_options\n"
        "theirs = list(inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters)\n"
        "expanded_options.install(); expanded_options.install()\n"
        "expand = rejection_sampler.expand_batch_to_tokens\n"
        "assert 'expand_batch_to_tokens(' in inspect.getsource(rejection_sampler.apply_sampling_constraints)\n"
        "ends = torch.tensor([2, 2, 5], dtype=torch.int32)\n"
        "print(theirs == ['x', 'cu_num_tokens', 'num_tokens', 'replace_from', 'replace_to'],\n"
        "      expand(torch.tensor([0.5, 9.0, 0.0]), ends, 5, replace_from=0, replace_to=1).tolist(),\n"
        "      expand(torch.tensor([3, 4, 5], dtype=torch.int32), ends, 5).tolist())\n"
    )
    assert release.run(code) == "True [0.5, 0.5, 1.0, 1.0, 1.0] [3, 3, 5, 5, 5]"


def test_a_runner_without_the_method_is_refused(release: Release) -> None:
    code = CONFIG + (
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner\n"
        "from vllm_toptheta.backend.hooks import batch_rows\n"
        "from vllm_toptheta.errors import UnsupportedError\n"
        "del GPUModelRunner._prepare_inputs\n"
        "try:\n"
        "    batch_rows.install(config_of(use_v2_model_runner=False))\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    assert release.run(code) == (
        "per_request: vllm.v1.worker.gpu_model_runner does not tell which request stands in which row of a batch. "
        "Set it to false."
    )


def test_requests_without_verification_have_pages_of_their_own(release: Release) -> None:
    code = (
        "from vllm.sampling_params import SamplingParams\n"
        "from vllm.utils.hashing import sha256\n"
        "from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash\n"
        "from vllm.v1.engine import EngineCoreRequest\n"
        "from vllm.v1.request import Request\n"
        "from vllm_toptheta.backend.hooks import lossy_cache\n"
        "lossy_cache.install(); lossy_cache.install()\n"
        "init_none_hash(sha256)\n"
        "hasher = get_request_block_hasher(16, sha256)\n"
        "def hashes(asked, salt=None):\n"
        "    sampling = SamplingParams(extra_args=asked and {'toptheta': asked})\n"
        "    names = EngineCoreRequest.__struct_fields__\n"
        "    fields = dict.fromkeys(names, None) | {'request_id': 'r', 'prompt_token_ids': [7] * 40,\n"
        "        'sampling_params': sampling, 'arrival_time': 0.0, 'cache_salt': salt, 'client_index': 0,\n"
        "        'priority': 0, 'resumable': False, 'abort_immediately': False, 'current_wave': 0}\n"
        "    request = EngineCoreRequest(**{name: fields[name] for name in names})\n"
        "    made = tuple(Request.from_engine_core_request(request, hasher).block_hashes)\n"
        "    assert len(made) == 2 and request.cache_salt == salt\n"
        "    return made\n"
        "assert hashes(None) == hashes('dense') == hashes('floor:2')\n"
        "assert hashes('lossy') == hashes(' LOSSY floor:2')\n"
        "print(len({hashes(None), hashes('lossy'), hashes(None, 's'), hashes('lossy', 's')}))\n"
    )
    assert release.run(code) == "4"


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
    code = (
        "from types import SimpleNamespace as S\n"
        "from vllm import SamplingParams\n"
        "from vllm.exceptions import VLLMValidationError\n"
        "from vllm_toptheta.backend.hooks import request_validation\n"
        "from vllm_toptheta.backend.request_choices import RequestChoices\n"
        "from vllm_toptheta.backend.plan import Plan\n"
        "request_validation.install(); request_validation.install()\n"
        "Plan.resolve = lambda config: S(choices=RequestChoices(None))\n"
        "from vllm.v1.engine.async_llm import AsyncLLM\n"
        "from vllm.v1.engine.input_processor import InputProcessor\n"
        "from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest\n"
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest\n"
        "def processor_of(name):\n"
        "    return S(vllm_config=S(attention_config=S(backend=S(name=name)), model_config='model'))\n"
        "processor = processor_of('TOPTHETA')\n"
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
        "options = {'vllm_xargs': {'toptheta': 'dense'}, 'use_beam_search': True}\n"
        "asked = CompletionRequest(prompt='x', **options)\n"
        "attempt(lambda: asked.to_beam_search_params(4, {}))\n"
        "chat = ChatCompletionRequest(messages=[{'role': 'user', 'content': 'x'}], **options)\n"
        "attempt(lambda: chat.to_beam_search_params(4, {}))\n"
        "CompletionRequest(prompt='x', use_beam_search=True).to_beam_search_params(4, {})\n"
        "good = SamplingParams(extra_args={'toptheta': 'dense', 'other': 1})\n"
        "AsyncLLM.generate(engine, 'prompt', good, 'id')\n"
        "AsyncLLM.generate(S(input_processor=processor_of('FLASH_ATTN')), 'prompt', bad, 'id')\n"
        "print(refused)\n"
    )
    assert release.run(code) == "[True, True, True, True, True]"
