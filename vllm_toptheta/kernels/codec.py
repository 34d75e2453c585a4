"""How keys become codes of shadow keys and back; no Triton, so that CPUs can use it too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_toptheta.limits import channels_for

NUM_LEVELS = 16  # of a channel


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
