"""How often each short text is sampled after one prompt; run as a process of its own.

python -m tests.e2e.sample RESULT < CONFIG
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from tests.e2e.generate import ENGINE


def main() -> None:
    """Write the counts of the texts, token ids joined by commas, and how many drafts were accepted.

    The configuration has `model`, `backend`, `options`, `prompt`, `number` (of samples), `sampling`, and, where
    there are any, `regex` that texts have to match, and `asked` of each request.
    """
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    config = json.load(sys.stdin)
    regex = config.get("regex")
    llm = LLM(
        model=config["model"],
        attention_backend=config["backend"],
        additional_config={"toptheta": config["options"]},
        disable_log_stats=False,
        skip_tokenizer_init=regex is None,
        max_model_len=512,
        max_num_seqs=128,
        seed=config.get("seed", 0),
        **ENGINE,
    )
    structure = None if regex is None else StructuredOutputsParams(regex=regex)
    sampling = SamplingParams(
        ignore_eos=True,
        detokenize=False,
        structured_outputs=structure,
        extra_args={"toptheta": config["asked"]} if "asked" in config else None,
        **config["sampling"],
    )
    prompts = [{"prompt_token_ids": config["prompt"]}] * config["number"]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    counts = Counter(",".join(map(str, output.outputs[0].token_ids)) for output in outputs)
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    accepted, drafted = (metrics.get(f"vllm:spec_decode_num_{name}_tokens", 0) for name in ("accepted", "draft"))
    Path(sys.argv[1]).write_text(json.dumps({"counts": counts, "accepted": accepted, "drafted": drafted}))


if __name__ == "__main__":
    main()
