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


def generate(environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """Run `config` in a new process.

    Args:
        environment: Added to `ENVIRONMENT`.
        config: `model`, `prompts` (token ids), `max_tokens`, optionally `backend`, `options` (the backend's), `engine`
            (further engine arguments) and `calls` (batches of prompts given one after the other).

    Returns:
        `outputs`: per prompt `token_ids` and `top2` (the two best log-probabilities of each step);
        `stats`: what the workers report, None on another backend; `preemptions`: how often a sequence was preempted.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", "tests.e2e.generate", str(result)],
            input=json.dumps(config),
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if process.returncode or not result.exists():
            raise RuntimeError(f"engine failed with code {process.returncode}:\n{process.stdout[-6000:]}")
        return json.loads(result.read_text())


def main() -> None:
    from vllm import LLM, SamplingParams

    from vllm_toptheta.telemetry.endpoint import STATS_RPC

    config = json.load(sys.stdin)
    options = config.get("options")
    llm = LLM(
        model=config["model"],
        attention_backend=config.get("backend"),
        **({"additional_config": {"toptheta": options}} if options else {}),
        **{
            "dtype": "float32",
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "disable_log_stats": False,
            **config.get("engine", {}),
        },
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=config["max_tokens"], logprobs=2, ignore_eos=True)
    outputs = []
    for batch in config.get("calls") or [config["prompts"]]:
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
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
