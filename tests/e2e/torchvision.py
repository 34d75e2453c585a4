"""What vLLM and transformers import of torchvision where they load a model that could read images.

The environment of CPUs has none, because builds on the package index are linked against CUDA; text needs none of it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

_KINDS = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
_FILES = {
    "__init__.py": '__version__ = "0.28.0"\n',
    "io.py": "ImageReadMode = decode_image = None\n",
    "transforms/__init__.py": f"from enum import Enum\n\nInterpolationMode = Enum('InterpolationMode', {_KINDS})\n",
    "transforms/functional.py": "pil_to_tensor = None\n",
    "transforms/v2/__init__.py": "",
    "transforms/v2/functional.py": "from torchvision.transforms import InterpolationMode\n",
}


def with_torchvision(folder: Path) -> dict[str, str]:
    """Returns environment variables by which an engine finds a torchvision: ours, of names alone, where there is none.

    Args:
        folder: Where it is put.
    """
    if find_spec("torchvision") is not None:
        return {}
    for name, text in _FILES.items():
        file = folder / "torchvision" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
