"""What a model directory must be before transformers is let at it.

transformers skips what it does not know of a quantisation, reads integers as if they were weights, and says of a file
that is not there that another is missing. Here the file or the field is named.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer

from vllm_toptheta.errors import CheckpointError, ModelConfigError
from vllm_toptheta.store import LFS_POINTER, Architecture, read_config

__all__ = ["check_model_files", "check_size"]

_READ_BY_TRANSFORMERS = (
    *("*.safetensors", "*.bin", "*.model", "*.index.json", "tokenizer*.json", "vocab.json"),
    *("special_tokens_map.json", "generation_config.json"),
)
_AGAIN = "Download or write the model again"
_WHOLE_NUMBERS = {"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
# ternary weights, packed: no format takes less
_MIN_BITS = 1.5


def check_model_files(model_dir: Path) -> None:
    """Refuses a directory whose files cannot be what transformers takes them for.

    Args:
        model_dir: a Hugging Face model directory.

    Raises:
        ModelConfigError: config.json is not there, lacks what a fingerprint needs, or says of dtype, quantisation or
            rotary embedding what nobody knows.
        CheckpointError: a file is a link to nothing, a folder, unreadable, empty or a pointer of Git LFS; or weights
            are whole numbers, and config.json does not say of what.
    """
    config = read_config(model_dir)
    file = model_dir / "config.json"
    Architecture.from_hf_config(config, file=file)
    nested = config.get("text_config")
    for prefix, fields in (("", config), ("text_config.", nested if isinstance(nested, Mapping) else {})):
        _check_dtype(fields, prefix, file)
        _check_rope_type(fields, prefix, file)
    _check_quantization(config.get("quantization_config"), file)
    for pattern in _READ_BY_TRANSFORMERS:
        for found in sorted(model_dir.glob(pattern)):
            _check_file(found)
    for weights in sorted(model_dir.glob("*.safetensors")):
        _check_weights(weights, may_be_packed=config.get("quantization_config") is not None)


def check_size(model_dir: Path, config: Any) -> None:
    """Refuses a config.json that describes a larger model than the weights could be, before room is made for it.

    Args:
        model_dir: a Hugging Face model directory.
        config: its config, as transformers reads it.

    Raises:
        CheckpointError: the weights are too few.
    """
    num_bytes = sum(file.stat().st_size for ending in ("safetensors", "bin") for file in model_dir.glob(f"*.{ending}"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_bytes and num_parameters * _MIN_BITS / 8 > num_bytes:
        raise CheckpointError(
            f"the checkpoint is not that of config.json: it takes {num_bytes} bytes, and the model has "
            f"{num_parameters} parameters",
            file=model_dir,
            remedy="Give a directory with the config.json and all the weights of one model",
        )


def _check_dtype(config: Mapping[str, Any], prefix: str, file: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is None or value == "auto":
            continue
        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise ModelConfigError(
                f"no dtype {value!r}", file=file, field=prefix + name, remedy="Write bfloat16, float16 or float32"
            )


def _check_rope_type(config: Mapping[str, Any], prefix: str, file: Path) -> None:
    """That of all layers, or of each type of layers."""
    for place in ("rope_parameters", "rope_scaling"):
        parameters = config.get(place) or {}
        layers = {f"{name}.": value for name, value in parameters.items() if isinstance(value, Mapping)}
        for layer, own in {"": parameters, **layers}.items():
            for name in ("rope_type", "type"):
                kind = own.get(name)
                if kind is not None and kind not in ["default", "su", "mrope", *ROPE_INIT_FUNCTIONS]:
                    raise ModelConfigError(
                        f"transformers knows no rotary embedding {kind!r}",
                        file=file,
                        field=f"{prefix}{place}.{layer}{name}",
                        remedy=f"It knows default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}",
                    )


def _check_quantization(quantization: Any, file: Path) -> None:
    if quantization is None:
        return
    field, remedy = "quantization_config", "Calibrate the model that it was made of: thresholds fit both"
    if not isinstance(quantization, Mapping):
        raise ModelConfigError(f"expected an object, got {quantization!r}"[:120], file=file, field=field, remedy=remedy)
    method = quantization.get("quant_method")
    loads_bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    # of others transformers skips the quantisation, and takes packed numbers for weights
    if not loads_bits and (not isinstance(method, str) or not AutoHfQuantizer.supports_quant_method(quantization)):
        algorithm = quantization.get("quant_algo")
        named = f"{method!r}{f' ({algorithm})' if algorithm else ''}"
        raise ModelConfigError(
            f"transformers cannot load what was quantised by {named}",
            file=file,
            field=f"{field}.quant_method",
            remedy=remedy,
        )


def _check_file(file: Path) -> None:
    if file.exists() and not file.is_file():
        # a named pipe would be waited for
        raise CheckpointError("not a regular file", file=file, remedy=_AGAIN)
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except (OSError, RuntimeError) as error:  # a cycle of links is a RuntimeError until Python 3.13
        dangling = file.is_symlink() and not file.exists()
        reason = "a link to what is not there" if dangling else getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"cannot be read: {reason}", file=file, remedy=_AGAIN) from None
    if start == LFS_POINTER:
        raise CheckpointError("a pointer of Git LFS, not the file itself", file=file, remedy="Run `git lfs pull`")
    if not start:
        raise CheckpointError("the file is empty", file=file, remedy=_AGAIN)


def _check_weights(file: Path, *, may_be_packed: bool) -> None:
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                if not may_be_packed and name.endswith(".weight") and part.get_dtype() in _WHOLE_NUMBERS:
                    raise CheckpointError(
                        f"whole numbers ({part.get_dtype()}) of shape {part.get_shape()}, and config.json names no "
                        "quantization_config that says what they stand for",
                        file=file,
                        field=name,
                        remedy=_AGAIN,
                    )
    except SafetensorError as error:
        raise CheckpointError(f"the weights are damaged: {error}", file=file, remedy=_AGAIN) from error
