"""How the V1 runner's drafts are drawn, and what verification is told of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

from vllm_toptheta.backend.drafts.v1_runner import SelfDrafts, as_certain
from vllm_toptheta.backend.hooks import expanded_options

VOCABULARY = 7


def options(temperature: list[float], **few: Any) -> Any:
    """A batch's sampling metadata, as far as drafts and their verification look at it."""
    return SimpleNamespace(
        temperature=torch.tensor(temperature),
        all_greedy=not any(temperature),
        all_random=all(temperature),
        top_k=few.get("top_k") and torch.tensor(few["top_k"], dtype=torch.int32),
        top_p=few.get("top_p") and torch.tensor(few["top_p"]),
    )


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> SelfDrafts:
    """Without an engine."""
    made = SelfDrafts.__new__(SelfDrafts)
    made._enable_probabilistic_draft_probs, made.use_fp64_gumbel = True, False
    monkeypatch.setattr(
        "vllm_toptheta.backend.drafts.v1_runner.replace", lambda one, **new: SimpleNamespace(**{**vars(one), **new})
    )
    return made


@pytest.mark.parametrize(
    "few",
    [
        {},
        {"top_k": [3, 2, VOCABULARY]},
        {"top_p": [0.5, 0.9, 1.0]},
        {"top_k": [3, 4, VOCABULARY], "top_p": [0.7, 0.9, 1.0]},
    ],
    ids=["all", "top-k", "top-p", "both"],
)
def test_drafts_are_drawn_as_verification_would(drafts: SelfDrafts, few: dict[str, Any]) -> None:
    expanded_options.install()
    torch.manual_seed(0)
    logits, asked = 2 * torch.randn(3, VOCABULARY), options([0.7, 1.5, 1.0], **few)
    expected = apply_sampling_constraints(logits.clone(), torch.arange(1, 4), asked).softmax(dim=1)
    counts = torch.zeros(3, VOCABULARY)
    for _ in range(2000):
        tokens, probabilities = drafts._sample_from_logits(logits.clone(), asked)
        counts.scatter_add_(1, tokens[:, None], torch.ones(3, 1))
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(counts / 2000, expected, atol=0.04, rtol=0)
    assert not counts[expected == 0].any()


def test_greedy_requests_beside_others_draft_the_likeliest_token(drafts: SelfDrafts) -> None:
    logits = torch.randn(4, VOCABULARY)
    asked = options([0.0, 1.0, 0.0, 1.0], top_k=[VOCABULARY, 2, VOCABULARY, 2])
    tokens, _ = drafts._sample_from_logits(logits.clone(), asked)
    assert tokens[::2].tolist() == logits.argmax(dim=1)[::2].tolist()


@pytest.mark.parametrize("certain", [True, False])
def test_what_a_grammar_cuts(certain: bool) -> None:
    # of the model under the grammar, which forbids the last token, and of drafts, which do not know it
    model, drawn = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.1, 0.2, 0.1, 0.6])
    found = torch.zeros(4)
    for token in range(4):
        told = drawn.clone().view(1, 1, 4)
        if certain:
            as_certain(told, torch.tensor([[token]]), [0])
        accepted = float((model[token] / told[0, 0, token]).clamp(max=1))
        rest = (model - told[0, 0]).clamp(min=0)
        found[token] += drawn[token] * accepted
        # what is forbidden is cut, and not rejected
        found += drawn[token] * (1 - accepted) * (model if token == 3 else rest / rest.sum().clamp(min=1e-9))
    distance = float((found - model).abs().sum())
    # or there are too few of those that drafts seldom are
    assert distance < 1e-5 if certain else distance > 0.1


def test_others_keep_their_probabilities() -> None:
    before = torch.rand(3, 2, 5)
    after = as_certain(before.clone(), torch.tensor([[0, 1], [2, 3], [4, 0]]), [1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
