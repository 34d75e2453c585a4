import pytest
import torch
from transformers import CohereConfig, Gemma2Config

from tests.calibration.tiny_model import random_tokens, tiny_model
from vllm_toptheta.calibration.model import hidden_states
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.losses import compare_predictions, head_of, next_token_logits


@pytest.mark.parametrize("num_prompt_tokens", [0, 1, 20, 49])
def test_losses_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, num_prompt_tokens: int) -> None:
    monkeypatch.setattr("vllm_toptheta.evaluation.losses._BLOCK_ROWS", 7)
    model, tokens = tiny_model(), random_tokens(50)
    dense = hidden_states(model, tokens)
    sparse = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    (losses,) = compare_predictions(
        head_of(model, tokens), tokens, dense, [sparse], num_prompt_tokens=num_prompt_tokens
    )
    first = max(num_prompt_tokens, 1)
    targets = tokens[first:]
    before, after = (next_token_logits(model, states[first - 1 : -1]).log_softmax(-1) for states in (dense, sparse))
    assert losses.num_tokens == len(targets)
    assert losses.dense == pytest.approx(float(torch.nn.functional.nll_loss(before, targets)), rel=1e-5)
    assert losses.sparse == pytest.approx(float(torch.nn.functional.nll_loss(after, targets)), rel=1e-5)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert losses.kl_divergence == pytest.approx(float(divergence), rel=1e-4)
    assert losses.top1_agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))


def test_a_head_that_is_not_understood_is_refused() -> None:
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = random_tokens(20)
    capped = tiny_model(Gemma2Config(**shape, **heads, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.3))
    assert head_of(capped, tokens)(hidden_states(capped, tokens)).abs().max() <= 2.0
    scaled = tiny_model(CohereConfig(**shape, **heads, logit_scale=0.5, initializer_range=0.3))
    with pytest.raises(EvaluationError, match="changes its logits"):
        head_of(scaled, tokens)
