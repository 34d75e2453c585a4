"""Requests that come, stop, and are left at random times, on one engine; run as a process of its own.

python -m tests.e2e.lossless_load RESULT < CONFIG
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.e2e.generate import ENGINE


def main() -> None:
    """Write the texts of requests that were not left, and how many drafts were accepted.

    The configuration has `model`, `backend`, `options`, `engine`, `seed`, `preempted` (how likely
    all requests are before a step, and the prefix cache is emptied) and `requests`, each of `prompt`,
    `max_tokens`, `stop` (token ids) and `left` (tokens after which it is left, or null).
    """
    from vllm import LLM, SamplingParams

    config = json.load(sys.stdin)
    llm = LLM(
        model=config["model"],
        attention_backend=config["backend"],
        additional_config={"toptheta": config["options"]},
        disable_log_stats=False,
        skip_tokenizer_init=True,
        **{**ENGINE, **config["engine"]},
    )
    engine, chance = llm.llm_engine, random.Random(config["seed"])  # noqa: S311 - nothing is secret
    waiting = list(enumerate(config["requests"]))
    texts: dict[str, list[int]] = {}
    running: dict[str, dict[str, Any]] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and (not running or chance.random() < 0.4):
            index, request = waiting.pop(0)
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=request["max_tokens"],
                stop_token_ids=request["stop"],
                ignore_eos=True,
                detokenize=False,
            )
            engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, sampling)
            running[str(index)] = request
        if chance.random() < config["preempted"]:
            engine.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            left = running[output.request_id]["left"]
            if output.finished:
                texts[output.request_id] = tokens
                del running[output.request_id]
            elif left is not None and len(tokens) >= left:
                engine.abort_request([output.request_id])
                del running[output.request_id]
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    counts = {
        name: metrics.get(f"vllm:{key}", 0)
        for name, key in {
            "accepted": "spec_decode_num_accepted_tokens",
            "drafted": "spec_decode_num_draft_tokens",
            "preemptions": "num_preemptions",
            "prefix_hits": "prefix_cache_hits",
        }.items()
    }
    Path(sys.argv[1]).write_text(json.dumps({"texts": texts, **counts}))


if __name__ == "__main__":
    main()
