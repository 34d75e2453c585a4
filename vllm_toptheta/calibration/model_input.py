"""What a model can read: how many tokens, and which."""

from typing import Any

from torch import Tensor

from vllm_toptheta.errors import CalibrationError

__all__ = ["check_input", "max_positions"]

# positions that a longer context was trained for are counted in, of these; of others they are multiplied
_COUNTED_IN = {"default", "llama3", "longrope", "su", "mrope"}


def max_positions(model: Any) -> int | None:
    """Returns how many tokens a model reads at most, as vLLM counts them; None where its config does not say.

    Args:
        model: a transformers causal language model.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # where layers differ, those of the full ones
    rope = rope.get("full_attention", rope)
    if positions is None or rope.get("rope_type", "default") in _COUNTED_IN:
        return positions
    if rope["rope_type"] == "yarn":
        positions = rope.get("original_max_position_embeddings") or positions
    return int(positions * (rope.get("factor") or 1))


def check_input(model: Any, token_ids: Tensor, *, field: str = "length") -> None:
    """Refuses tokens that a model cannot read.

    Args:
        model: a transformers causal language model.
        token_ids: `[seq_len]` int64.
        field: the option that says how many, for the message of an error.

    Raises:
        CalibrationError: there are more than it has positions, or one that it has no embedding for.
    """
    longest, num_tokens = max_positions(model), model.get_input_embeddings().weight.shape[0]
    if longest is not None and len(token_ids) > longest:
        raise CalibrationError(
            f"{len(token_ids)} tokens are more than the {longest} positions of the model (max_position_embeddings)",
            field=field,
            remedy="Ask for shorter sequences",
        )
    if int(token_ids.max()) >= num_tokens:
        raise CalibrationError(
            f"the tokenizer makes token {int(token_ids.max())}, and the model knows {num_tokens} tokens",
            field="vocab_size",
            remedy="Give the directory the tokenizer that the model was trained with",
        )
