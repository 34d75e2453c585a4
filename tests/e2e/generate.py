"""Generate greedily with one engine configuration and write what came out as JSON; run as a process of its own.

A vLLM engine takes over its process (logging, signals, threads), and comparing configurations needs several of them.
Starting one takes longer than most of what it is asked, so an engine serves several calls, each with statistics of its
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.ports import free_port
from tests.e2e.texts import ON_GPU

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "toptheta",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # asking whether there is a GPU would initialise CUDA, and vLLM's engine, a fork, could not do so again
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# a guard that lowers thresholds makes texts depend on when it looked
ONLY_WATCHED = {"TOPTHETA_GUARD": "warn"}
# vLLM would start two more processes, which import as much as the first; servers and several ranks show that it can
IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
IN_PROCESSES_OF_THEIR_OWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

CPU_ENGINE = {"dtype": "float32", "enforce_eager": True}
# full graphs without compiling the model, which takes a minute; float16 rounds eight times finer than bfloat16; a fixed
# cache, because an engine that measures free memory cannot bear another process on the card
GPU_ENGINE = {
    "dtype": "float16",
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2 << 30,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}
ENGINE = GPU_ENGINE if ON_GPU else CPU_ENGINE

COUNTS = ("decode_steps", "decode_tokens", "dense_tokens", "asked_tokens")
HEAD_COUNTS = ("decode_tokens", "dense_tokens", "asked_tokens", "rows_cached", "rows_read", "keys_read", "copies_read")


class Call(NamedTuple):
    """One batch of requests; the next one comes when all of them have ended.

    Attributes:
        prompts: Token ids.
        max_tokens: Tokens to generate for each.
        asked: What each prompt asks for in its extra arguments, None for nothing; None if none asks for anything.
        refused: Whether the engine must refuse it.
        slept: The level at which the engine sleeps, and wakes up, before it; 0 for not at all.
        structures: What each text has to follow, the fields of vLLM's `StructuredOutputsParams`; None for any text.
    """

    prompts: list[list[int]]
    max_tokens: int = 40
    asked: list[Any] | None = None
    refused: bool = False
    slept: int = 0
    structures: list[dict[str, Any] | None] | None = None


def generate(calls: Sequence[Call], environment: dict[str, str] | None = None, **config: Any) -> list[dict[str, Any]]:
    """Start an engine in a new process, and make the calls one after the other.

    Args:
        calls: What it is asked.
        environment: Added to `ENVIRONMENT`.
        config: `model`, optionally `backend`, `options` (the backend's), `engine` (further engine arguments) and
            `prefill`, the options of a second engine that reads the prompts and passes their pages on by NIXL, with
            `prefill_engine`, arguments of that one alone.

    Returns:
        Of each call
        `outputs`: per prompt `token_ids` and `top2` (the two best log-probabilities of each step);
        `refusal`: why the engine refused the call, None if it did not;
        `stats`: what the workers counted during the call, None on another backend; the first call's include whatever
        the engine counted before it; `asleep`: what they answered while they slept, None if they did not;
        `preemptions`: how often a sequence was preempted; `prefix_hits`: prompt tokens found in the cache;
        `brought`: prompt tokens that a connector brought;
        `accepted`, `drafted`: speculated tokens; `verifications`: how often those of a sequence were verified;
        `block_size`: tokens of a page, which vLLM raises for some models;
        `python_decodes`: calls of the GPU backend's decode step from Python instead of a graph, and `graph_mode`:
        vLLM's CUDA graph mode as the engine resolved it. These are known only with `IN_THIS_PROCESS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", "tests.e2e.generate", str(result)],
            input=json.dumps({"calls": calls, **config}),
            env={
                **os.environ,
                **ENVIRONMENT,
                **ONLY_WATCHED,
                **({} if ON_GPU else IN_THIS_PROCESS),
                **(environment or {}),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if process.returncode or not result.exists():
            raise RuntimeError(f"engine failed with code {process.returncode}:\n{process.stdout[-6000:]}")
        return json.loads(result.read_text())


def main() -> None:
    from vllm import LLM

    from vllm_toptheta.telemetry.reader import STATS_RPC

    config = json.load(sys.stdin)

    def start(options: dict[str, Any] | None, **engine: Any) -> LLM:
        return LLM(
            model=config["model"],
            attention_backend=config.get("backend"),
            # contexts are short here, and those are dense on GPUs unless told otherwise
            additional_config={
                "toptheta": {"min_context": 0} | (options or {}),
                # of hybrids; FlashInfer is not everywhere
                "gdn_prefill_backend": "triton",
            },
            **{
                "max_model_len": 4096,
                "max_num_seqs": 8,
                "disable_log_stats": False,
                **ENGINE,
                **config.get("engine", {}),
                **engine,
            },
        )

    reader = None
    if config.get("prefill") is None:
        llm = start(config.get("options"))
    else:
        reader = start(config["prefill"], **_by_nixl("kv_producer"), **config.get("prefill_engine", {}))
        llm = start(config.get("options"), **_by_nixl("kv_consumer"))
    python_decodes = _count_python_decodes() if ON_GPU else []
    results: list[dict[str, Any]] = []
    stats, counters = None, {"python_decodes": 0}
    for call in (Call(*fields) for fields in config["calls"]):
        asleep = _sleep(llm, call.slept, STATS_RPC) if call.slept else None
        answer = _answer(llm, call, _read(reader, call) if reader else [])
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        now = {
            "preemptions": metrics["vllm:num_preemptions"],
            "prefix_hits": metrics["vllm:prefix_cache_hits"],
            "brought": metrics.get("vllm:external_prefix_cache_hits", 0),
            "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
            "drafted": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
            "verifications": metrics.get("vllm:spec_decode_num_drafts", 0),
            "python_decodes": len(python_decodes),
        }
        earlier, stats = stats, llm.collective_rpc(STATS_RPC)
        results.append(
            {
                **answer,
                "asleep": asleep,
                "stats": [since(*ranks) for ranks in zip(earlier or [None] * len(stats), stats, strict=True)],
                **{name: value - counters.get(name, 0) for name, value in now.items()},
                "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
                "graph_mode": llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name,
            }
        )
        counters = now
    Path(sys.argv[1]).write_text(json.dumps(results))


def since(earlier: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a rank counted between two of its reports; all of it without an earlier one."""
    if earlier is None or now is None:
        return now
    asked = {label: count - earlier["requests"].get(label, 0) for label, count in now["requests"].items()}
    return {
        **now,
        **{name: now[name] - earlier[name] for name in COUNTS},
        "requests": {label: count for label, count in asked.items() if count},
        "layers": [_since_of_head(*heads) for heads in zip(earlier["layers"], now["layers"], strict=True)],
        "lost_mass": [
            {
                "layer": new["layer"],
                "counts": [b - a for a, b in zip(old["counts"], new["counts"], strict=True)],
                "sum": new["sum"] - old["sum"],
            }
            for old, new in zip(earlier["lost_mass"], now["lost_mass"], strict=True)
        ],
    }


def _since_of_head(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    # a mean over the tokens to which the server's thresholds applied
    tokens = [head["decode_tokens"] - head["dense_tokens"] - head["asked_tokens"] for head in (earlier, now)]
    lost_mass = now["lost_mass_mean"] * tokens[1] - earlier["lost_mass_mean"] * tokens[0]
    return {
        **now,
        **{name: now[name] - earlier[name] for name in HEAD_COUNTS if now[name] is not None},
        "lost_mass_mean": lost_mass / max(1, tokens[1] - tokens[0]),
    }


def _by_nixl(role: str) -> dict[str, Any]:
    """The arguments of an engine that passes pages on to another one, or takes them, by NIXL."""
    # the engine, a process that starts next, is told by its environment where others ask it for its pages
    os.environ |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    # machines that are busy take longer than pages are kept for
    extra = {"kv_lease_duration": 600}
    return {
        "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": role, "kv_connector_extra_config": extra}
    }


def _read(reader: Any, call: Call) -> list[dict[str, Any]]:
    """Have an engine read the prompts of a call; where another one finds the pages of each."""
    from vllm import SamplingParams

    asks = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    answers = reader.generate([{"prompt_token_ids": ids} for ids in call.prompts], asks, use_tqdm=False)
    return [answer.kv_transfer_params for answer in answers]


def _answer(llm: Any, call: Call, transfers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    nothing = [None] * len(call.prompts)
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=call.max_tokens,
            logprobs=2,
            # the end of what follows a grammar
            ignore_eos=structure is None,
            extra_args={
                **({"toptheta": asked} if asked else {}),
                **({"kv_transfer_params": transfer} if transfer else {}),
            }
            or None,
            structured_outputs=StructuredOutputsParams(**structure) if structure else None,
        )
        for asked, structure, transfer in zip(
            call.asked or nothing, call.structures or nothing, transfers or nothing, strict=True
        )
    ]
    try:
        answers = llm.generate([{"prompt_token_ids": ids} for ids in call.prompts], sampling, use_tqdm=False)
    except Exception as error:  # of which class depends on vLLM's version
        if not call.refused:
            raise
        return {"outputs": [], "refusal": str(error)}
    outputs = []
    for answer in answers:
        best = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in answer.outputs[0].logprobs]
        outputs.append({"token_ids": list(answer.outputs[0].token_ids), "top2": [step[:2] for step in best]})
    return {"outputs": outputs, "refusal": None}


def _sleep(llm: Any, level: int, stats_rpc: str) -> list[dict[str, Any] | None]:
    """Have the engine sleep and wake up; what its workers say in between."""
    llm.sleep(level=level)
    said = llm.collective_rpc(stats_rpc)
    llm.wake_up()
    if level > 1:  # which throws weights away
        llm.collective_rpc("reload_weights")
    return said


def _count_python_decodes() -> list[int]:
    """A list that grows with every call of the GPU backend's decode step; replays of a graph do not call it."""
    from vllm_toptheta.backend.gpu import GpuTopThetaImpl

    calls: list[int] = []
    decode = GpuTopThetaImpl._decode

    def counted(*args: Any) -> None:
        calls.append(len(args[2].query))
        decode(*args)

    GpuTopThetaImpl._decode = counted
    return calls


if __name__ == "__main__":
    main()
