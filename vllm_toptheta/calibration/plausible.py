"""Whether a model understands a text at all, before anything is calibrated on it or said of it.

A tokenizer that leaves out the token that every prompt of the model began with, another model's tokenizer, or weights
that are somebody else's make no error anywhere: the model runs, and its attention is nobody's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.calibration.model_input import check_input
from vllm_toptheta.errors import CalibrationError

__all__ = ["MAX_SHARE_OF_GUESSING", "check_understanding", "is_new"]

# of the loss of a guess among all tokens; random letters are at 0.73 of it in SmolLM2-135M, another tokenizer's at 1.25
MAX_SHARE_OF_GUESSING = 0.9
_MAX_GAIN_BY_BEGIN = 1.0  # nats per token; less than 0.1 where a model was trained without that token
_NUM_TOKENS = 256  # of the first sequence
_MIN_TOKENS = 64  # fewer say nothing
_SMALL_VOCABULARY = 1024  # of bytes or letters: the new ones are the odd ones


def check_understanding(
    model: Any, sequences: Sequence[Tensor], *, model_dir: Path, length_field: str = "length"
) -> None:
    """Refuses a model that predicts the first sequence no better than a guess, or far better behind its first token.

    Args:
        model: a transformers causal language model.
        sequences: `[seq_len]` int64 each, at least 2 tokens; of less than 64 only the input is checked.
        model_dir: where the model comes from, named by the errors.
        length_field: the option that says how long they are, for the message of an error.

    Raises:
        CalibrationError: the predictions are absurd or not finite, or a sequence is none that the model can read.
    """
    for sequence in sequences:
        check_input(model, sequence, field=length_field)
    token_ids = sequences[0][:_NUM_TOKENS]
    num_tokens = model.get_output_embeddings().weight.shape[0]
    loss, guess = _loss(model, token_ids), math.log(num_tokens)
    if not math.isfinite(loss):
        raise CalibrationError(
            "the model's predictions are NaN or infinite",
            file=model_dir,
            remedy="Check its weights and config.json, and try --dtype float32",
        )
    if len(token_ids) < _MIN_TOKENS:
        return
    begin = getattr(model.config.get_text_config(), "bos_token_id", None)
    # some configs have -1, or several
    if isinstance(begin, int) and 0 <= begin < num_tokens and int(token_ids[0]) != begin:
        started = _loss(model, torch.cat([token_ids.new_tensor([begin]), token_ids[:-1]]), num_given=2)
        if loss - started > _MAX_GAIN_BY_BEGIN:
            raise CalibrationError(
                f"the tokenizer leaves out the token {begin} that a prompt of this model begins with: with it the loss "
                f"is {started:.2f} nats per new token, without it {loss:.2f}",
                file=model_dir,
                field="bos_token",
                remedy="Set add_bos_token and bos_token in tokenizer_config.json",
            )
    if loss > MAX_SHARE_OF_GUESSING * guess:
        raise CalibrationError(
            f"the model does not understand the text: its loss is {loss:.2f} nats per new token, and a guess among all "
            f"tokens has {guess:.2f}",
            file=model_dir,
            remedy="Check that weights and tokenizer belong together, and that the text is in the model's language",
        )


def _loss(model: Any, token_ids: Tensor, *, num_given: int = 1) -> float:
    """Mean loss of new tokens behind those given, nats, of the model as it is: with its own head and attention."""
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        logits = model(input_ids=token_ids[None].to(device), use_cache=False).logits[0, num_given - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(logits, token_ids[num_given:].to(logits.device), reduction="none")
    counted = is_new(token_ids)[num_given:].to(losses.device)
    if logits.shape[-1] < _SMALL_VOCABULARY or not counted.any():
        return float(losses.mean())
    return float(losses[counted].mean())


def is_new(token_ids: Tensor) -> Tensor:
    """Returns which tokens occur for the first time.

    Any model predicts some of the others, whatever they stand for: it has seen them follow each other.

    Args:
        token_ids: `[seq_len]` int64.

    Returns:
        `[seq_len]` bool.
    """
    places: dict[int, int] = {}
    for place, token in enumerate(token_ids.tolist()):
        places.setdefault(token, place)
    found = torch.zeros(len(token_ids), dtype=torch.bool)
    found[list(places.values())] = True
    return found
