"""Launch parameters of the decode kernel, by card, head size and width of a cached element: a small committed table.

`launch_table.json` lists where they differ from the defaults; `toptheta bench tune` searches for such an entry on a GPU
and writes it. A card that has none takes that of `TUNED_CARD`. Nothing is tuned while serving.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.cuda.value_split import DENSE_STEP_TOKENS, PIECE_TOKENS, ValueLoader

TABLE = Path(__file__).with_name("launch_table.json")
TUNED_CARD = "sm90"
MOST_OF_FOUR_WARPS = 2048  # channels of all queries of a kv head, whose sums fit into their registers
_INTERPRETER_SMS = 2  # there is no GPU to ask; a few splits exercise the merge


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """What both modes are launched by.

    Attributes:
        tile: Keys, or shadow keys, per step of the scan.
        num_warps: Warps of a program.
        min_group: Columns that the group's heads are padded to where exact keys and values are multiplied; from 16 on,
            Hopper's asynchronous products are used.
        max_registers: Registers per thread, at most, so that `programs_per_sm` fit; None leaves it to the compiler.
        scan_stages: Depth of the scan's software pipeline.
        dense_tile: Keys per step where a sequence keeps everything.
        dense_stages: Depth of that loop's pipeline.
        min_work: Tiles that are worth a program.
        programs_per_sm: Programs per multiprocessor: as many as run at a time, since each gets an equal share.
        merge_warps: Warps of a program of the merge; 0 chooses.
        early_launch: Launch each kernel while its predecessor runs (programmatic dependent launch).
        dense_length: Tokens up to which a sequence keeps every key, where nobody says otherwise: it is no slower so.
        dense_tokens: Likewise, the tokens for each program up to which a step does.
        dense_step_tokens: Those of a step, where they do not depend on the programs; None where they do.
        piece_tokens: Tokens that a program scans in the time that a piece takes beside them; 0 is not known.
    """

    tile: int
    num_warps: int = 4
    min_group: int = 8
    max_registers: int | None
    scan_stages: int = 3
    dense_tile: int = 64
    dense_stages: int = 2
    min_work: int
    programs_per_sm: int
    merge_warps: int = 0
    early_launch: bool = True
    dense_length: int = 2048
    dense_tokens: int
    dense_step_tokens: int | None = None
    piece_tokens: int = 0

    def num_programs(self, num_kv_heads: int, num_sms: int) -> int:
        """Programs of each kv head."""
        return max(1, self.programs_per_sm * num_sms // num_kv_heads)

    def min_step_tokens(self, num_kv_heads: int, num_sms: int) -> int:
        """Tokens of a step, over its sequences, below which it is no slower if every key is kept."""
        if self.dense_step_tokens is not None:
            return self.dense_step_tokens
        return self.dense_tokens * self.num_programs(num_kv_heads, num_sms)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(_Parameters):
    """How the kernels of mode `values` are launched.

    Attributes:
        gather_stages: Depth of the pipeline over the survivors' values.
    """

    tile: int = 64
    max_registers: int | None = 168
    gather_stages: int = 2
    min_work: int = 4
    programs_per_sm: int = 3
    dense_tokens: int = 640

    def for_drafts(self, num_queries: int, head_size: int) -> LaunchConfig:
        """The same, for sequences of several new tokens, which together have so many queries on a kv head."""
        # their sums do not fit into the registers that a third program leaves, and if there are many, only into those
        # of twice the threads
        warps, programs = (4, 2) if num_queries * head_size <= MOST_OF_FOUR_WARPS else (8, 1)
        return replace(self, max_registers=None, num_warps=warps, programs_per_sm=min(self.programs_per_sm, programs))

    def for_loader(self, loader: ValueLoader | None) -> LaunchConfig:
        """The same, for the kernel that `loader` loads, if there is one."""
        if loader is None:
            return self
        return replace(
            self,
            programs_per_sm=loader.sizes.resident,
            dense_step_tokens=DENSE_STEP_TOKENS,
            piece_tokens=PIECE_TOKENS,
        )


@dataclass(frozen=True, kw_only=True)
class ShadowConfig(_Parameters):
    """How the kernels of mode `shadow` are launched, by calibrated shadow keys or by copies of keys and values.

    Attributes:
        chunk_tiles: Tiles scanned between two looks at how long the lists are.
        list_depth: Candidates that a lane of the tile has room for.
        walk_tile: Candidates per step of the walk.
        walk_stages: Depth of the walk's pipeline.
        dense_work: Work of a token of a sequence that keeps everything, relative to one that is scanned.
        few_tokens: Tokens for each program without which a step reads all keys; scanning takes longer.
        short_length: Tokens of a sequence, in the mean of a step, below which it reads all keys.
    """

    tile: int = 256
    max_registers: int | None = None
    chunk_tiles: int = 16
    list_depth: int = 32
    walk_tile: int = 128
    walk_stages: int = 1
    dense_work: int = 8
    few_tokens: int = 448
    short_length: int = 1152
    min_work: int = 2
    programs_per_sm: int = 2
    dense_tokens: int = 448

    def scans(self, num_seqs: int, length: int, *, num_programs: int) -> bool:
        """Whether sequences of `length` tokens each are scanned, as `schedule.reads_all_keys` decides on the device."""
        return num_seqs * length >= self.few_tokens * num_programs and length >= self.short_length

    @property
    def scanning(self) -> ShadowConfig:
        """The same, but for scanning every step."""
        return replace(self, few_tokens=0, short_length=0, dense_length=0, dense_tokens=0)

    def __post_init__(self) -> None:
        if not 0 < self.chunk_tiles <= self.list_depth:
            raise ValueError(f"list_depth: {self.list_depth} is less than the {self.chunk_tiles} tiles of a chunk")


# of copies of keys and values: scores are weighed in the scan, which takes twice the registers a row
TIER_CONFIG = ShadowConfig(tile=128)


def tier_config(loader: TierLoader | None) -> ShadowConfig:
    """How copies are read: by Triton's kernels, or by those that `loader` loads."""
    if loader is None:
        return TIER_CONFIG
    resident = loader.sizes.resident
    # up to 33,000 tokens with 8 kv heads, and up to the lengths that are dense, the kernels of mode values are as fast
    return ShadowConfig(
        tile=256,
        programs_per_sm=resident,
        piece_tokens=1536,
        few_tokens=2048 // resident,
        short_length=2112,
        dense_tokens=896 // resident,
    )


def launch_options(num_warps: int, max_registers: int | None = None, *, is_early: bool = False) -> dict[str, Any]:
    """Options of a launch; `is_early`: while the kernel before still runs."""
    registers = {"maxnreg": max_registers} if max_registers else {}
    return {"num_warps": num_warps, **registers, **({"launch_pdl": True} if is_early else {})}


def launch_config(head_size: int, element_bytes: int, device: torch.device | str) -> LaunchConfig:
    """The table's entry for a card, a head size and the bytes of a cached element, or the defaults."""
    keys = [_key(card, head_size, element_bytes) for card in (card_name(torch.device(device)), TUNED_CARD)]
    return next((_table()[key] for key in keys if key in _table()), LaunchConfig())


def save_entry(head_size: int, element_bytes: int, card: str, config: LaunchConfig, path: Path = TABLE) -> None:
    """Write an entry of the table over the one that it has, if any."""
    configs = _read(path) | {_key(card, head_size, element_bytes): config}
    default = asdict(LaunchConfig())
    entries = {
        key: {name: value for name, value in asdict(config).items() if value != default[name]}
        for key, config in sorted(configs.items())
    }
    path.write_text(json.dumps(entries, indent=1) + "\n")


def card_name(device: torch.device) -> str:
    """The card's compute capability, as in sm90; where Triton interprets on the CPU, that of the tuned card."""
    return "sm{}{}".format(*_capability(device.index or 0)) if device.type == "cuda" else TUNED_CARD


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or a stand-in where Triton interprets on the CPU."""
    return _num_multiprocessors(device.index or 0) if device.type == "cuda" else _INTERPRETER_SMS


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can start while its predecessor runs: Hopper and later."""
    return device.type == "cuda" and _capability(device.index or 0) >= (9, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _table() -> dict[str, LaunchConfig]:
    return _read(TABLE)


def _read(path: Path) -> dict[str, LaunchConfig]:
    return {key: LaunchConfig(**entry) for key, entry in json.loads(path.read_text()).items()}


def _key(card: str, head_size: int, element_bytes: int) -> str:
    return f"{card}, head size {head_size}, {8 * element_bytes} bit"
