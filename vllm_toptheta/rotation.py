"""A fixed rotation that makes the channels of any row alike, for copies in few bits.

A row with a few large channels becomes one whose channels are of one size, whatever the row: then one step for all of
them is enough, and nothing has to be calibrated. Source: QuIP#, arXiv 2402.04396.

May import nothing of the package.
"""

from __future__ import annotations

import functools
import math

import torch


@functools.cache
def rotation(head_size: int) -> torch.Tensor:
    """R, [head_size, head_size] float32, orthonormal; y = R x. The same everywhere and at all times.

    A Hadamard matrix of the largest power of two in `head_size`, a cosine transform of what is left of it, and signs.
    """
    size = head_size & -head_size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rest = head_size // size
    index = torch.arange(rest, dtype=torch.float64)
    cosine = torch.cos(math.pi / rest * index[:, None] * (index + 0.5))
    cosine /= cosine.norm(dim=1, keepdim=True)
    # they break up what a row has in common with one of the transform's, such as a constant
    signs = torch.where(torch.arange(1, head_size + 1, dtype=torch.float64) * math.sqrt(2) % 1 < 0.5, 1.0, -1.0)
    return (torch.kron(cosine, hadamard / math.sqrt(size)) * signs).float()
