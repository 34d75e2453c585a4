"""What all kernels check of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expect(name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise a ValueError that starts with `name` unless a tensor has a shape and dtype, and its last axis is dense."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: last axis has stride {tensor.stride(-1)}, expected 1")
