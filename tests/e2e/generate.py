"""Generate greedily with one engine configuration and print the result as JSON; run as a process of its own.

    python -m tests.e2e.generate '{"model": ..., "backend": "toptheta", "prompts": [[1, 2, ...]], "max_tokens": 16}'

A vLLM engine takes over its process (logging, signals, threads), and comparing configurations needs several of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "toptheta",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}
# a guard that lowers thresholds makes texts depend on when it looked
ONLY_WATCHED = {"TOPTHETA_GUARD": "warn"}

ON_CPU = {"dtype": "float32", "enforce_eager": True}
# full graphs without compiling the model, which takes a minute; float16 rounds eight times finer than bfloat16; a fixed
# cache, because an engine that measures free memory cannot bear another process on the card
ON_GPU = {
    "dtype": "float16",
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2 << 30,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}


def generate(environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """Run `config` in a new process.

    Args:
        environment: Added to `ENVIRONMENT`.
        config: `model`, `prompts` (token ids), `max_tokens`, optionally `backend`, `options` (the backend's), `engine`
            (further engine arguments), `calls` (batches of prompts given one after the other) and `asked` (what each
            prompt of a batch asks for in its extra arguments; None for nothing).

    Returns:
        `outputs`: per prompt `token_ids` and `top2` (the two best log-probabilities of each step);
        `stats`: what the workers report, None on another backend;
        `preemptions`: how often a sequence was preempted; `prefix_hits`: prompt tokens found in the cache;
        `accepted`, `drafted`: speculated tokens;
        `graph_mode`: vLLM's CUDA graph mode as the engine resolved it, and `python_decodes`: calls of the GPU
        backend's decode step from Python instead of a graph. Both are known only where the engine runs in the same
        process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", "tests.e2e.generate", str(result)],
            input=json.dumps(config),
            env={**os.environ, **ENVIRONMENT, **ONLY_WATCHED, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if process.returncode or not result.exists():
            raise RuntimeError(f"engine failed with code {process.returncode}:\n{process.stdout[-6000:]}")
        return json.loads(result.read_text())


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams

    from vllm_toptheta.telemetry.reader import STATS_RPC

    config = json.load(sys.stdin)
    options = config.get("options")
    llm = LLM(
        model=config["model"],
        attention_backend=config.get("backend"),
        **({"additional_config": {"toptheta": options}} if options else {}),
        **{
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "disable_log_stats": False,
            **(ON_GPU if torch.cuda.is_available() else ON_CPU),
            **config.get("engine", {}),
        },
    )
    python_decodes = _count_python_decodes() if torch.cuda.is_available() else []
    greedy = {"temperature": 0.0, "max_tokens": config["max_tokens"], "logprobs": 2, "ignore_eos": True}
    outputs = []
    for batch in config.get("calls") or [config["prompts"]]:
        asked = config.get("asked") or [None] * len(batch)
        sampling = [SamplingParams(**greedy, extra_args={"toptheta": one} if one else None) for one in asked]
        for output in llm.generate([{"prompt_token_ids": ids} for ids in batch], sampling, use_tqdm=False):
            best = [
                sorted((entry.logprob for entry in step.values()), reverse=True) for step in output.outputs[0].logprobs
            ]
            outputs.append({"token_ids": list(output.outputs[0].token_ids), "top2": [step[:2] for step in best]})
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    result = {
        "outputs": outputs,
        "stats": llm.collective_rpc(STATS_RPC),
        "preemptions": counters["vllm:num_preemptions"],
        "prefix_hits": counters["vllm:prefix_cache_hits"],
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens"),
        "graph_mode": llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name,
        "python_decodes": len(python_decodes),
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


def _count_python_decodes() -> list[int]:
    """A list that grows with every call of the GPU backend's decode step; replays of a graph do not call it."""
    from vllm_toptheta.backend.gpu import GpuTopThetaImpl

    calls: list[int] = []
    decode = GpuTopThetaImpl._decode

    def counted(*args: Any) -> None:
        calls.append(len(args[2]))
        decode(*args)

    GpuTopThetaImpl._decode = counted
    return calls


if __name__ == "__main__":
    main()
