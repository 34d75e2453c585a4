"""Which keys survive in a benchmark's step: drawn by a rule, or as they did in a real model (`record`).

What a step costs depends on where its survivors are, not on what their keys hold. So a pattern is replayed by keys made
for it (`registry.Inputs.replay`), in any number of sequences, kv heads and channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.limits import NUM_FIRST_ANCHORS
from vllm_toptheta.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

CLUSTER_TOKENS = 1024
# of the logarithm of a cluster's weight: the fullest 1,024 of 32K tokens hold about 8 times the mean
CLUSTER_SPREAD = 1.75
SKEW = 100.0  # the most survivors of a sequence, or head, over the fewest
_LONG_GAP = 255


@dataclass(frozen=True)
class Batch:
    """The step that a pattern is wanted for.

    Attributes:
        lens: Tokens of each sequence.
        num_kv_heads: Heads of the cache.
        group: Query heads of each.
    """

    lens: Sequence[int]
    num_kv_heads: int
    group: int


class Pattern(Protocol):
    """A pattern.

    Attributes:
        name: For tables.
        num_layers: How many layers it has; each is a step of its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_layers(self) -> int: ...

    def survivors(self, layer: int, batch: Batch) -> list[torch.Tensor]:
        """What the query heads of each sequence keep in a layer, [num_kv_heads, group, seq_len] bool on the CPU."""


@dataclass(frozen=True)
class Drawn:
    """A pattern by a rule, the same in every layer.

    Attributes:
        rule: even: at equal distances, each head from another start. clustered: more in some stretches of
            `CLUSTER_TOKENS` than in others, which the heads of a group share. skewed-by-sequence, skewed-by-head:
            evenly, `SKEW` times as many in one sequence, or kv head, as in another.
        target_k: Survivors of a head, on average.
    """

    rule: str
    target_k: int

    @property
    def name(self) -> str:
        return self.rule

    @property
    def num_layers(self) -> int:
        return 1

    def survivors(self, layer: int, batch: Batch) -> list[torch.Tensor]:
        """See `Pattern.survivors`."""
        return [self._of_sequence(row, batch) for row in range(len(batch.lens))]

    def _of_sequence(self, row: int, batch: Batch) -> torch.Tensor:
        length = batch.lens[row]
        generator = torch.Generator().manual_seed(row)
        heads = [self._count(row, head, batch) for head in range(batch.num_kv_heads)]
        if self.rule == "clustered":
            weights = torch.randn(batch.num_kv_heads, 1, -(-length // CLUSTER_TOKENS), generator=generator)
            logits = (CLUSTER_SPREAD * weights).repeat_interleave(CLUSTER_TOKENS, dim=2)[..., :length]
            # the largest of logits plus Gumbel noise are a draw without replacement
            noise = torch.rand(batch.num_kv_heads, batch.group, length, generator=generator).log().neg().log().neg()
            drawn = (logits + noise).topk(heads[0], dim=2).indices
            return torch.zeros(noise.shape, dtype=torch.bool).scatter_(2, drawn, True)
        starts = torch.rand(batch.num_kv_heads, batch.group, generator=generator)
        return torch.stack(
            [_evenly(length, count, start) for count, start in zip(heads, starts.split(1), strict=True)]
        ).squeeze(1)

    def _count(self, row: int, head: int, batch: Batch) -> int:
        ranks = {"skewed-by-sequence": (row, len(batch.lens)), "skewed-by-head": (head, batch.num_kv_heads)}
        rank, number = ranks.get(self.rule, (0, 1))
        exponents = np.arange(number) / max(number - 1, 1)
        factor = float(SKEW ** exponents[rank] / (SKEW**exponents).mean())
        return min(batch.lens[row], max(1, round(self.target_k * factor)))


@dataclass(frozen=True)
class Spread:
    """As many value rows as another pattern has in each layer, evenly: in every kv head, for all query heads alike."""

    pattern: Pattern

    @property
    def name(self) -> str:
        return f"even, the rows of {self.pattern.name}"

    @property
    def num_layers(self) -> int:
        return self.pattern.num_layers

    def survivors(self, layer: int, batch: Batch) -> list[torch.Tensor]:
        """See `Pattern.survivors`."""
        num_rows = sum(int(kept.any(dim=1).sum()) for kept in self.pattern.survivors(layer, batch))
        share = num_rows / (sum(batch.lens) * batch.num_kv_heads)
        generator = torch.Generator().manual_seed(layer)
        return [
            _evenly(length, max(1, round(share * length)), torch.rand(batch.num_kv_heads, 1, generator=generator))
            .expand(-1, batch.group, -1)
            .clone()
            for length in batch.lens
        ]


def _evenly(length: int, count: int, starts: torch.Tensor) -> torch.Tensor:
    """[*starts.shape, length] bool, `count` at equal distances; `starts` are fractions of such a distance."""
    distance = length / count
    positions = ((torch.arange(count) + starts[..., None]) * distance).long().clamp_(max=length - 1)
    return torch.zeros(*starts.shape, length, dtype=torch.bool).scatter_(-1, positions, True)


class PatternInfo(BaseModel):
    """Where a recorded pattern comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(default=1, ge=1, le=1)
    model: str = Field(description="Name of the model's directory.")
    text: tuple[str, ...] = Field(description="Names of the files.")
    weight_floor: float = Field(gt=0, description="In multiples of a row's average weight.")
    layers: tuple[int, ...] = Field(min_length=1, description="Of the model, ascending: those without windows.")
    row_lengths: tuple[int, ...] = Field(min_length=1, description="Keys that each recorded row sees.")
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    rows_read_share: float = Field(gt=0, le=1, description="Value rows that a kv head reads over those cached.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, rows, query heads."""
        return len(self.layers), len(self.row_lengths), self.num_heads


@dataclass(frozen=True, eq=False)
class Recorded:
    """What the query heads of a real model keep in some rows of each layer.

    Attributes:
        info: Where it comes from.
        kept: By layer, row and query head: positions of the survivors, ascending, int64.
    """

    info: PatternInfo
    kept: tuple[tuple[tuple[NDArray[np.int64], ...], ...], ...]

    @property
    def name(self) -> str:
        return f"{self.info.model}, {max(self.info.row_lengths):,} tokens, floor:{self.info.weight_floor:g}"

    @property
    def num_layers(self) -> int:
        return len(self.info.layers)

    def survivors(self, layer: int, batch: Batch) -> list[torch.Tensor]:
        """See `Pattern.survivors`.

        Recorded rows and kv heads take turns over the sequences and kv heads of the batch. Groups of more heads than
        the model's take the others from the next recorded row, smaller ones leave some out. In a sequence of another
        length, the first `NUM_FIRST_ANCHORS` keys are as recorded, and the others by their distance from the last:
        repeated in a longer one, cut off in a shorter one.
        """
        return [self._of_sequence(layer, row, batch) for row in range(len(batch.lens))]

    def _of_sequence(self, layer: int, row: int, batch: Batch) -> torch.Tensor:
        info = self.info
        of_model = info.num_heads // info.num_kv_heads
        length = batch.lens[row]
        result = torch.zeros(batch.num_kv_heads, batch.group, length, dtype=torch.bool)
        for head in range(batch.num_kv_heads):
            turn = row * batch.num_kv_heads + head
            first_row, kv_head = turn // info.num_kv_heads, turn % info.num_kv_heads
            for member in range(batch.group):
                recorded_row = (first_row + member // of_model) % len(info.row_lengths)
                kept = self.kept[layer][recorded_row][kv_head * of_model + member % of_model]
                recorded = torch.zeros(info.row_lengths[recorded_row], dtype=torch.bool)
                recorded[torch.from_numpy(kept)] = True
                result[head, member] = _resize(recorded, length)
        return result

    def save(self, file: Path) -> None:
        """Write it: distances between survivors as bytes, about one for each.

        Raises:
            BenchmarkError: It cannot be written.
        """
        from safetensors.numpy import save

        gaps = [[[_encode(head) for head in row] for row in layer] for layer in self.kept]
        sizes = np.array([[[len(head) for head in row] for row in layer] for layer in gaps], np.int32)
        flat = np.concatenate([head for layer in gaps for row in layer for head in row])
        content = save({"gaps": flat, "sizes": sizes}, metadata={"pattern": self.info.model_dump_json()})
        try:
            write_whole(file, content)
        except OSError as error:
            raise BenchmarkError(
                f"cannot be written: {error.strerror}",
                file=file,
                field="out",
                remedy="Name a file in a folder that you may write to, on a disk with room",
            ) from None

    @classmethod
    def load(cls, file: Path) -> Recorded:
        """Read what `save` wrote.

        Raises:
            BenchmarkError: There is no such file, or it is none or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "numpy") as saved:
                info = PatternInfo.model_validate_json((saved.metadata() or {}).get("pattern", ""))
                gaps, sizes = saved.get_tensor("gaps"), saved.get_tensor("sizes")
            shape = info.shape
            if sizes.shape != shape or sizes.min() < 0 or sizes.sum() != len(gaps) or gaps.dtype != np.uint8:
                raise ValueError("sizes do not fit")
            pieces = iter(np.split(gaps, sizes.ravel().cumsum()[:-1]))
            kept = tuple(
                tuple(tuple(_decode(next(pieces), length) for _ in range(shape[2])) for length in info.row_lengths)
                for _ in info.layers
            )
        except FileNotFoundError:
            raise BenchmarkError(
                "no such pattern", file=file, remedy=f"Name a file of `toptheta bench record`, or {', '.join(RULES)}"
            ) from None
        except (OSError, SafetensorError, ValidationError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BenchmarkError(
                f"no recorded pattern: {reason}", file=file, remedy="Record it again: `toptheta bench record`"
            ) from None
        return cls(info, kept)


RULES = ("even", "clustered", "skewed-by-sequence", "skewed-by-head")


def pattern_of(name: str, *, target_k: int) -> Pattern:
    """The pattern of a rule's name or of a file.

    Args:
        name: One of `RULES`, or a file of `toptheta bench record`.
        target_k: Survivors of a head, on average, where a rule draws them.

    Raises:
        BenchmarkError: It is neither.
    """
    return Drawn(name, target_k) if name in RULES else Recorded.load(Path(name))


def _resize(recorded: torch.Tensor, length: int) -> torch.Tensor:
    others = len(recorded) - NUM_FIRST_ANCHORS
    if len(recorded) == length or others <= 0:
        return recorded[:length]
    from_last = torch.arange(length - 1, -1, -1) % others
    resized = recorded[len(recorded) - 1 - from_last]
    resized[:NUM_FIRST_ANCHORS] = recorded[:NUM_FIRST_ANCHORS][:length]
    return resized


def _encode(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Numbers of keys skipped before each survivor; 255 stands for 255 of them and more to come."""
    gaps = np.diff(positions, prepend=-1) - 1
    lengths = gaps // _LONG_GAP + 1
    encoded = np.full(int(lengths.sum()), _LONG_GAP, np.uint8)
    encoded[lengths.cumsum() - 1] = gaps % _LONG_GAP
    return encoded


def _decode(encoded: NDArray[np.uint8], length: int) -> NDArray[np.int64]:
    ends = np.flatnonzero(encoded != _LONG_GAP)
    positions: NDArray[np.int64] = encoded.cumsum(dtype=np.int64)[ends] + np.arange(len(ends))
    if len(encoded) and (encoded[-1] == _LONG_GAP or positions[-1] >= length):
        raise ValueError("a position lies behind the row")
    return positions
