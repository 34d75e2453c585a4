"""What measuring inside an engine relies on, in the oldest and the newest supported release."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calibration.tiny_model import save_model_dir
from tests.compat.release import Release

pytestmark = pytest.mark.compat


def test_the_engine_takes_our_arguments(release: Release, tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny")
    code = (
        "from pathlib import Path\n"
        "from vllm_toptheta.engine import EngineSubject\n"
        f"subject = EngineSubject(Path({str(model)!r}), max_length=64, window=8, engine_args='--dtype float16')\n"
        "found = subject._arguments\n"
        "print(found.dtype, found.max_num_batched_tokens, found.worker_extension_cls)\n"
    )
    assert release.run(code) == "float16 1024 vllm_toptheta.engine.worker.MeasuringWorker"


def test_a_worker_runs_the_model_on_tokens_of_ours(release: Release) -> None:
    """Prefix and window through vLLM's own way to a layer's implementation, with a model that is one layer."""
    code = (
        "import torch\n"
        "from types import SimpleNamespace as S\n"
        "import vllm.model_executor.layers.attention.attention as attention\n"
        "from vllm_toptheta.engine.worker import WorkerDecoder\n"
        "layer = attention.Attention.__new__(attention.Attention); torch.nn.Module.__init__(layer)\n"
        "name = layer.layer_name = 'model.layers.0.attn'\n"
        "layer.sliding_window, layer.kv_cache = None, torch.empty(0)\n"
        "layer.impl = S(scale=1.0, logits_soft_cap=0)\n"
        "context = S(static_forward_context={name: layer}, fast_moe_cold_start=False, static_all_moe_layers=[])\n"
        "parallel = S(data_parallel_size=1, use_sequence_parallel_moe=False, enable_dbo=False, is_moe_model=False)\n"
        "config = S(compilation_config=context, parallel_config=parallel, model_config=S(uses_mrope=False),\n"
        "           kv_transfer_config=None)\n"
        "def model(input_ids, positions):\n"
        "    seen.append(positions.tolist())\n"
        "    query, output = torch.zeros(len(input_ids), 2, 4), torch.empty(len(input_ids), 2, 4)\n"
        "    key = input_ids.float()[:, None, None].expand(-1, 1, 4)\n"
        "    attention.unified_attention_with_output(query, key, key, output, name)\n"
        "    return output\n"
        "seen = []\n"
        "worker = S(get_model=lambda: model, vllm_config=config, device='cpu')\n"
        "decoder = WorkerDecoder(worker)\n"
        "with decoder.attending():\n"
        "    cache = decoder.read_prefix(torch.tensor([1, 2, 6]), on_rows=seen.append)\n"
        "    states = decoder.read_window(cache, torch.tensor([7, 4]), observe=lambda call, result: None)\n"
        "assert not hasattr(layer.impl, 'forward')\n"
        "print(seen, states[:, 0, 0].tolist())\n"
    )
    # each row is the mean of what it sees
    assert release.run(code) == "[[0, 1, 2], 3, [3, 4]] [4.0, 4.0]"
