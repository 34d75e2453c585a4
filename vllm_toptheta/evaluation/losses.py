"""Losses and divergences of next-token predictions, with logits made a block of rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.calibration.model import hidden_states
from vllm_toptheta.errors import EvaluationError

__all__ = ["Head", "Losses", "compare_predictions", "head_of", "next_token_logits"]

# of predictions made at a time: 75 MB of logits with a vocabulary of 150,000
_BLOCK_ROWS = 128
_PROBE_TOKENS = 8

# hidden states `[num_rows, hidden_size]` to logits `[num_rows, vocab_size]` float32
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """How two sets of predictions of one sequence compare; means over its predicted tokens.

    Attributes:
        num_tokens: predicted tokens.
        dense: loss of the dense predictions, nats.
        sparse: loss of the sparse predictions, nats.
        kl_divergence: KL(dense || sparse), nats.
        top1_agreement: share of tokens for which both predict the same one.
        acceptance: sum over the vocabulary of the smaller of the two probabilities: how often a token that is drawn
            from the sparse predictions is accepted as one drawn from the dense predictions.
    """

    num_tokens: int
    dense: float
    sparse: float
    kl_divergence: float
    top1_agreement: float
    acceptance: float


def compare_predictions(
    head: Head, token_ids: Tensor, dense: Tensor, sparse: Sequence[Tensor], *, num_prompt_tokens: int = 0
) -> list[Losses]:
    """Compares the predictions that follow from dense hidden states with those that follow from sparse ones.

    Args:
        head: of the model whose states they are.
        token_ids: `[seq_len]` int64, at least 2 tokens.
        dense: `[seq_len, hidden_size]`, from `hidden_states`.
        sparse: any number of the same.
        num_prompt_tokens: how many tokens are given rather than predicted; the first one always is. Fewer than all.

    Returns:
        One result for each of `sparse`.
    """
    first = max(num_prompt_tokens, 1)
    targets = token_ids[first:].to(dense.device)
    sums = torch.zeros(len(sparse), 5, dtype=torch.float64)
    for start in range(0, len(targets), _BLOCK_ROWS):
        block = targets[start : start + _BLOCK_ROWS]
        # the row of a token predicts the one after it
        rows = slice(first - 1 + start, first - 1 + start + len(block))
        dense_log = head(dense[rows]).log_softmax(dim=-1)
        for index, states in enumerate(sparse):
            sparse_log = head(states[rows]).log_softmax(dim=-1)
            sums[index] += torch.stack(
                [
                    _loss(dense_log, block),
                    _loss(sparse_log, block),
                    torch.nn.functional.kl_div(sparse_log, dense_log, reduction="sum", log_target=True).double(),
                    (dense_log.argmax(dim=-1) == sparse_log.argmax(dim=-1)).sum().double(),
                    torch.minimum(dense_log, sparse_log).exp().sum().double(),
                ]
            ).cpu()
    return [Losses(len(targets), *means) for means in (sums / len(targets)).tolist()]


def head_of(model: Any, token_ids: Tensor) -> Head:
    """Returns the head of a model.

    Args:
        model: a transformers causal language model.
        token_ids: `[seq_len]` int64, to try it on.

    Raises:
        EvaluationError: the model does more to its logits than `next_token_logits` knows.
    """
    probe = token_ids[:_PROBE_TOKENS].to(model.device)
    with torch.inference_mode():
        expected = model(input_ids=probe[None], use_cache=False).logits[0].float()
    actual = next_token_logits(model, hidden_states(model, probe))
    # bfloat16 models round their own cap, which this evaluation computes in float32
    if not torch.allclose(actual, expected, rtol=2e-2, atol=2e-2):
        raise EvaluationError(f"{type(model).__name__} changes its logits in a way that the evaluation does not know")
    return partial(next_token_logits, model)


def next_token_logits(model: Any, states: Tensor) -> Tensor:
    """Returns the model's logits: its output embedding, and the cap that Gemma 2 puts on it.

    Args:
        model: a transformers causal language model.
        states: `[num_rows, hidden_size]`, from `hidden_states`.

    Returns:
        `[num_rows, vocab_size]` float32.
    """
    with torch.inference_mode():
        logits: Tensor = model.get_output_embeddings()(states).float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[:, None]).double().sum()
