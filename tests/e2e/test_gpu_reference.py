"""The engine's greedy text on the GPU is the reference's: prompts attended to densely, generated tokens by thresholds.

The reference reads a prompt together with what the engine generated and says at every token what it would have
generated itself. Up to the first difference that is the same as generating, and far quicker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.generate import Call, generate
from tests.e2e.texts import ON_GPU, cut
from vllm_toptheta.calibration.model import hidden_states, load_model, overriding_attention
from vllm_toptheta.calibration.override import AttentionCall, AttentionOverride
from vllm_toptheta.evaluation.losses import next_token_logits
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import FULL_COMPENSATION, causal_scores, relative_threshold, top_theta_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
]

NUM_PROMPTS, LONGEST, MAX_TOKENS = 20, 7000, 48
WEIGHT_FLOOR = 3.0


class PromptOverride(AttentionOverride):
    """Dense rows up to the prompt's end, thresholded rows behind it."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def attend(self, call: AttentionCall) -> torch.Tensor:
        query, key, value, softmax_scale = call.query, call.key, call.value, call.softmax_scale
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=softmax_scale, enable_gqa=True
        )[0].transpose(0, 1)
        rows = slice(self.prompt_tokens, None)
        num_keys = torch.arange(self.prompt_tokens + 1, len(query) + 1, device=query.device)
        scores = causal_scores(query[rows], key, softmax_scale=softmax_scale)
        output[rows] = top_theta_attention(
            query[rows],
            key,
            value,
            threshold=relative_threshold(scores, num_keys, WEIGHT_FLOOR),
            target_k=NUM_ANCHORS,
            softmax_scale=softmax_scale,
            compensation=FULL_COMPENSATION,
        ).output.to(output.dtype)
        return output


def reference_log_probabilities(model: Any, override: PromptOverride, token_ids: torch.Tensor) -> torch.Tensor:
    """[generated tokens, vocabulary] float32."""
    with overriding_attention(model, override):
        states = hidden_states(model, token_ids)
    with torch.inference_mode():
        return next_token_logits(model, states[override.prompt_tokens - 1 : -1]).float().log_softmax(-1)


@pytest.mark.parametrize(("dtype", "least_equal"), [("float16", 15), ("bfloat16", 5)])
def test_same_text_as_the_reference(model: Path, text_ids: list[int], dtype: str, least_equal: int) -> None:
    # from 200 tokens, which are more than there are anchors, to 7,000
    lengths = [round(200 * (LONGEST / 200) ** (index / (NUM_PROMPTS - 1))) for index in range(NUM_PROMPTS)]
    prompts = cut(text_ids, lengths)
    engine = {"dtype": dtype, "max_model_len": 8192, "max_num_seqs": NUM_PROMPTS}
    (answer,) = generate(
        [Call(prompts, MAX_TOKENS)],
        model=str(model),
        backend="toptheta",
        options={"weight_floor": WEIGHT_FLOOR},
        engine=engine,
    )
    outputs = answer["outputs"]
    models = [load_model(model, dtype=each).cuda() for each in (getattr(torch, dtype), torch.float32)]
    same, gaps, deviations = 0, [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = torch.tensor(output["token_ids"])
        token_ids = torch.cat([torch.tensor(prompt), generated])
        rough, exact = (
            reference_log_probabilities(each, PromptOverride(len(prompt)), token_ids).cpu() for each in models
        )
        # how far rounding to the dtype moves what decides between the two best tokens
        best = exact.topk(2).indices
        deviations.append((rough - exact).gather(1, best).diff(dim=1).abs().flatten())
        different = (rough.argmax(-1) != generated).nonzero().flatten()
        if len(different):
            step = int(different[0])
            gaps.append(float(rough[step].max() - rough[step, generated[step]]))
        else:
            same += 1
    rounding = float(torch.cat(deviations).quantile(0.99))
    print(f"{dtype}: {same} of {NUM_PROMPTS} texts equal; gaps at first differences {gaps}; rounding {rounding:.3f}")  # noqa: T201
    assert all(gap <= rounding for gap in gaps), f"gaps {gaps}, rounding {rounding}"
    # in bfloat16 the two best logits are often the same number
    assert same >= least_equal
