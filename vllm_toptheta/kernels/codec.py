"""How keys and values become codes and back; no Triton, so that CPUs can use it too.

Two formats: calibrated projections of keys (`ShadowCodec`), and copies of keys and values that need no calibration
(`TierCodec`; `reference.tiers` has the formulas).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_toptheta.limits import COPY_MULTIPLE, channels_for
from vllm_toptheta.rotation import rotation

NUM_LEVELS = 16  # of a channel of a key
VALUE_LEVELS = 4
LEAST_STEP = 2.0**-24  # of float16
LARGEST_STEP = 65504.0
_STEP_BYTES = 2


class ShadowCodec(NamedTuple):
    """How the keys of a layer become codes, and what codes stand for; float32, contiguous.

    Attributes:
        encoder: [num_kv_heads, head_size, num_channels], from keys to steps.
        code_offset: [num_kv_heads, num_channels], 8 minus the steps of the mean key.
        decoder: [num_kv_heads, num_channels, head_size], from steps to keys.
        key_mean: [num_kv_heads, head_size].
    """

    encoder: torch.Tensor
    code_offset: torch.Tensor
    decoder: torch.Tensor
    key_mean: torch.Tensor

    @classmethod
    def build(cls, encoder: torch.Tensor, decoder: torch.Tensor, key_mean: torch.Tensor) -> ShadowCodec:
        """From the three tensors that a calibration finds.

        Raises:
            ValueError: A shape is not as described, or there are no kernels for the number of channels.
        """
        num_kv_heads, head_size, num_channels = encoder.shape
        if num_channels not in channels_for(head_size):
            allowed = ", ".join(map(str, channels_for(head_size)))
            raise ValueError(f"encoder: projects to {num_channels} channels, expected one of {allowed}")
        for name, tensor, shape in (
            ("decoder", decoder, (num_kv_heads, num_channels, head_size)),
            ("key_mean", key_mean, (num_kv_heads, head_size)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: {list(tensor.shape)}, expected {list(shape)}")
        encoder, decoder, key_mean = (tensor.float().contiguous() for tensor in (encoder, decoder, key_mean))
        offset = NUM_LEVELS // 2 - torch.einsum("hd,hdr->hr", key_mean, encoder)
        return cls(encoder, offset.contiguous(), decoder, key_mean)

    @property
    def code_bytes(self) -> int:
        """Bytes of a shadow key."""
        return self.encoder.shape[2] // 2


class TierCodec(NamedTuple):
    """What copies of keys and values are made with.

    Attributes:
        rotation: [head_size, head_size] float32, contiguous; rows are turned by it.
    """

    rotation: torch.Tensor

    @classmethod
    def build(cls, head_size: int, device: torch.device | str = "cpu") -> TierCodec:
        """For heads of a size.

        Raises:
            ValueError: Codes of such heads do not fill bytes.
        """
        if head_size % COPY_MULTIPLE:
            raise ValueError(
                f"head_size: {head_size}, expected a multiple of {COPY_MULTIPLE} for copies of keys and values"
            )
        return cls(rotation(head_size).to(device).contiguous())

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's copies: 4 bits a channel of a key, 2 of a value, and their steps."""
        return tier_bytes(len(self.rotation))


def tier_bytes(head_size: int) -> int:
    """`TierCodec.code_bytes` of heads of a size."""
    return head_size // 2 + head_size // 4 + 2 * _STEP_BYTES
