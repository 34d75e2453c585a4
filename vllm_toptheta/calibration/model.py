"""The seam to transformers: loads a model directory, and has a model take its attention from us.

No mask function is registered for our attention (`layer_attention`), so transformers builds no mask: overrides are
causal by themselves, over one unpadded sequence at a time.

Where a checkpoint and its config.json disagree, transformers makes up what is missing at random and says so in a log.
Thresholds of such a model, and figures, would be those of nobody's model: it is refused.
"""

import logging
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_toptheta import store
from vllm_toptheta.calibration.layer_attention import LayerAttention, check_call, register_attention
from vllm_toptheta.calibration.model_files import check_model_files, check_size
from vllm_toptheta.calibration.model_input import check_input
from vllm_toptheta.calibration.override import AttentionOverride, DenseOverride, windowed_attention
from vllm_toptheta.errors import CalibrationError, CheckpointError, TopThetaError

__all__ = [
    "attending",
    "hidden_states",
    "load_model",
    "load_tokenizer",
    "overriding_attention",
    "served_dtype",
    "usable_device",
]

_ATTENTION_NAME = "toptheta_override"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_NUM_NAMES = 3  # tensors that a message names
_MAX_REASON = 300  # characters of a message of transformers
_active_override: ContextVar[AttentionOverride] = ContextVar("active_override")


def load_model(
    model_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
) -> Any:
    """Loads a decoder model for inference, from its directory alone.

    Args:
        model_dir: a Hugging Face model directory.
        dtype: of the weights and activations; scores are float32 whatever it is.
        device: where to.
        device_map: how transformers spreads the model over devices, such as `auto`, instead of `device`.

    Returns:
        A transformers causal language model in evaluation mode.

    Raises:
        CalibrationError: there is no model there that transformers can load and run, or no such device; or it attends
            as no override and no server does.
        CheckpointError: the weights are damaged, or a tensor is missing, of another shape than config.json says, or
            nowhere in the model. Tied tensors may be missing, and what transformers knows as harmless may be there.
    """
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise CalibrationError(
                "spreading a model over devices needs the package accelerate",
                field="device_map",
                remedy="pip install 'vllm-toptheta[accelerate]', or name one device",
            )
        model = _load_checked(model_dir, dtype=dtype, device_map=device_map).eval()
    else:
        place = usable_device(device)
        model = _load_checked(model_dir, dtype=dtype).eval().to(place)
    _try_out(model, model_dir)
    return model


def usable_device(name: torch.device | str) -> torch.device:
    """Returns a device that is there.

    Args:
        name: cpu, cuda or cuda:N.

    Raises:
        CalibrationError: it is no device, or not there.
    """
    remedy = "Choose cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CalibrationError(f"no device {str(name)!r}", field="device", remedy=remedy) from error
    available = torch.cuda.device_count() if device.type == "cuda" else int(device.type == "cpu")
    if (device.index or 0) >= available:
        raise CalibrationError(
            f"there is no device {device}; this machine has {torch.cuda.device_count()} CUDA devices",
            field="device",
            remedy=remedy,
        )
    return device


def served_dtype(model_dir: Path) -> torch.dtype:
    """Returns the dtype in which vLLM serves a model unless it is told another: that of the checkpoint, in 16 bits.

    Args:
        model_dir: a Hugging Face model directory.

    Raises:
        CalibrationError: transformers cannot read its config.json.
    """
    dtype = _load(AutoConfig, model_dir).get_text_config().dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def load_tokenizer(model_dir: Path) -> Any:
    """Loads the tokenizer of a model directory.

    Args:
        model_dir: a Hugging Face model directory.

    Raises:
        CalibrationError: there is no tokenizer there that transformers can load.
    """
    check_model_files(model_dir)
    if not any(file for pattern in _TOKENIZER_FILES for file in model_dir.glob(pattern)):
        raise CalibrationError(
            "there is no tokenizer",
            file=model_dir,
            remedy=f"Put the model's tokenizer there: {', '.join(_TOKENIZER_FILES)}",
        )
    tokenizer = _load(AutoTokenizer, model_dir)
    with _one_error(model_dir):
        # some of what its files say is looked at when it is used
        tokenizer("words")
    return tokenizer


def _load_checked(model_dir: Path, **options: Any) -> Any:
    """A model all of whose tensors come from its checkpoint, and that has a place for all of the checkpoint's."""
    check_model_files(model_dir)
    with _one_error(model_dir):
        check_size(model_dir, AutoConfig.from_pretrained(model_dir, local_files_only=True))
    with _without_load_report():
        # tensors of other shapes are let through, so that they can be named here
        model, found = _load(
            AutoModelForCausalLM, model_dir, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    shapes = [f"{name} {list(has)} instead of {list(wanted)}" for name, has, wanted in found["mismatched_keys"]]
    problems = {
        "it lacks": found["missing_keys"],
        "it has in another shape": shapes,
        "it has, and the model has not": found["unexpected_keys"],
    }
    if any(problems.values()):
        raise CheckpointError(
            f"the checkpoint is not that of config.json: "
            f"{'; '.join(f'{problem} {_first(names)}' for problem, names in problems.items() if names)}",
            file=model_dir,
            remedy="Give a directory with the config.json and all the weights of one model",
        )
    return model


def _try_out(model: Any, model_dir: Path) -> None:
    """Runs two tokens, so that what a model cannot do is said before anything is read or written for it."""
    with _one_error(model_dir, "run"), torch.inference_mode():
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
        model(input_ids=tokens, use_cache=False)
        with overriding_attention(model, DenseOverride()):
            model(input_ids=tokens, use_cache=False)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from logging a table of what is refused with one message."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _first(names: Collection[str]) -> str:
    more = len(names) - _NUM_NAMES
    return ", ".join(sorted(names)[:_NUM_NAMES]) + (f" and {more} more" if more > 0 else "")


def _load(kind: Any, model_dir: Path, **options: Any) -> Any:
    with _one_error(model_dir):
        return kind.from_pretrained(model_dir, local_files_only=True, **options)


@contextmanager
def _one_error(model_dir: Path, doing: str = "load") -> Iterator[None]:
    try:
        yield
    except TopThetaError:
        raise
    except Exception as error:  # transformers raises whatever a field or a file of the wrong kind leads to
        # it goes on with advice, and with the names of all models that it knows
        reason = textwrap.shorten(f"{type(error).__name__}: {error}".split("\n\n")[0], _MAX_REASON)
        needs_package = isinstance(error, ImportError)
        field = "quantization_config" if needs_package else _field_of(reason, store.read_config(model_dir))
        raise CalibrationError(
            f"transformers cannot {doing} it: {reason}",
            file=model_dir if field is None else model_dir / "config.json",
            field=field,
            remedy="Install that package, or calibrate the model that this one was made of: thresholds fit both"
            if needs_package
            else "Check that the directory is that of a whole model, and that this transformers knows it",
        ) from error


def _field_of(reason: str, config: Mapping[str, Any]) -> str | None:
    """The field of config.json that a message of transformers is about: that it names, or whose value it quotes."""
    words = set(re.findall(r"\w+", reason))
    named = (name for name in config if "_" in name and name in words)
    quoted = (name for name, value in config.items() if f"'{value}'" in reason or f"`{value}`" in reason)
    return next(chain(named, quoted), None)


@contextmanager
def overriding_attention(model: Any, override: AttentionOverride) -> Iterator[None]:
    """Overrides a model's attention, and puts back what was there.

    Args:
        model: a transformers model that follows `AttentionInterface`.
        override: computes the attention of every layer that has no sliding window; those stay dense.

    Raises:
        CalibrationError: the model does not take its attention from `AttentionInterface`, or attends in chunks.
    """
    with attending(model, _ATTENTION_NAME, _active_override, override):
        yield


@contextmanager
def attending(model: Any, name: str, active: ContextVar[Any], value: Any) -> Iterator[None]:
    """Has a model take its attention from a function of `AttentionInterface`, and then from where it did.

    Args:
        model: a transformers model that follows `AttentionInterface`.
        name: what the function is registered as.
        active: where the function finds what it needs.
        value: that, as long as the model attends so.

    Raises:
        CalibrationError: the model does not take its attention from `AttentionInterface`, or attends in chunks.
    """
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise CalibrationError("layers with chunked attention are not supported", field="layer_types")
    original = model.config._attn_implementation
    token = active.set(value)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise CalibrationError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
            )
        yield
    finally:
        model.set_attn_implementation(original)
        active.reset(token)


def hidden_states(model: Any, token_ids: Tensor) -> Tensor:
    """Returns what the model's head would turn into logits, without running the head.

    Args:
        model: a transformers causal language model.
        token_ids: `[seq_len]` int64.

    Returns:
        `[seq_len, hidden_size]` of the model's dtype.

    Raises:
        CalibrationError: the model cannot read them.
    """
    check_input(model, token_ids)
    # of a model spread over devices, the first layer's
    first_device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model.base_model(input_ids=token_ids[None].to(first_device), use_cache=False)
    return output.last_hidden_state[0]


def _attend(asked: LayerAttention) -> Tensor:
    if asked.mask is not None or asked.query.shape[0] != 1 or asked.query.shape[2] != asked.key.shape[2]:
        raise CalibrationError("an override takes one whole sequence at a time, without padding, mask or cache")
    check_call(asked)
    call, window = asked.of_one_sequence(), asked.sliding_window
    output = _active_override.get().attend(call) if window is None else windowed_attention(call, window)
    return output[None]


register_attention(_ATTENTION_NAME, _attend)
