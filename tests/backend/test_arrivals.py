"""Pages that come back without their tails: what stands on them is answered as if they had never left; no engine.

Connectors bring the keys and values of any prefix of a sequence, for its first step or the first after a preemption.
Tails are then whatever the pages held before: here NaN for sums, and bytes that are no codes of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import KVTransferConfig, VllmConfig

from tests.backend.cpu_harness import UNWRITTEN, Harness, Step
from tests.fuzzing import fuzz
from vllm_toptheta.backend import cpu, plugin
from vllm_toptheta.kernels.pages import codes_view, value_sum_view

BLOCK_SIZE = 16
LONGEST = 400
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True, "dense_layers": [0]}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)


class Row(NamedTuple):
    """A sequence of a step.

    Attributes:
        context: Tokens in front of those that are new.
        new: New tokens.
        is_prefilling: Whether they are its prompt's; a sequence that was preempted may go on decoding.
        has_arrived: Whether its pages have been away.
    """

    context: int
    new: int
    is_prefilling: bool
    has_arrived: bool


ROWS = st.builds(
    Row,
    context=st.one_of(st.integers(1, LONGEST - 50), st.integers(1, 20).map(lambda pages: pages * BLOCK_SIZE)),
    new=st.sampled_from([1, 1, 1, 2, 17, 50]),
    is_prefilling=st.booleans(),
    has_arrived=st.booleans(),
)


class Pages(Harness):
    """Layers whose sequences may stand on the same pages, and lose the tails of some."""

    def restart(self, num_shared: int) -> None:
        """Pages nobody has written; the second sequence begins with so many of the first one's."""
        self.generator.manual_seed(0)
        for cache in self.caches:
            cache.fill_(UNWRITTEN)
        self.block_table = torch.arange(1, 1 + self.block_table.numel()).int().view_as(self.block_table)
        self.block_table[1, :num_shared] = self.block_table[0, :num_shared]
        self.spoil(torch.arange(len(self.caches[0])))

    def spoil(self, blocks: torch.Tensor) -> None:
        """Take the tails from some pages."""
        for layer, cache in zip(self.layers, self.caches, strict=True):
            value_sum_view(cache)[blocks] = torch.nan
            if layer.impl.layer.code_bytes:
                codes_view(cache, layer.impl.layer.code_bytes)[blocks] = 0xA5

    def answer(self, rows: list[Row], num_shared: int, *, leaves: bool, is_told: bool = True) -> list[torch.Tensor]:
        """Each layer's output of the rows' new tokens.

        Args:
            rows: At least two.
            num_shared: Pages of the first one that the second one stands on.
            leaves: Whether the pages of rows that have arrived lose their tails before.
            is_told: Whether the builder is told which rows have arrived.
        """
        self.restart(num_shared)
        contexts = [row.context for row in rows]
        self.builder.requests.arrived_rows = []
        self.run(Step(contexts, contexts, [True] * len(rows)))
        if leaves:
            away, stay = (
                [self.block_table[index] for index, row in enumerate(rows) if row.has_arrived == left]
                for left in (True, False)
            )
            gone = torch.cat(away).long()
            self.spoil(gone[~torch.isin(gone, torch.cat([*stay, torch.zeros(1)]).long())])
            if is_told:
                self.builder.requests.arrived_rows = [index for index, row in enumerate(rows) if row.has_arrived]
        lengths = [row.context + row.new for row in rows]
        _, outputs = self.run(Step(lengths, [row.new for row in rows], [row.is_prefilling for row in rows]))
        return outputs


def pages(make_config: Callable[..., VllmConfig], options: dict[str, Any], **engine: Any) -> Pages:
    config = make_config(options, dtype="float32", block_size=BLOCK_SIZE, **engine)
    return Pages(config, BLOCK_SIZE, [LONGEST] * 3)


@pytest.mark.parametrize("kind", ["values", "copies", "shadow keys"])
def test_what_came_back_is_answered_as_what_stayed(
    make_config: Callable[..., VllmConfig], shadow_folder: Path, kind: str
) -> None:
    options = {
        "values": {"dense_layers": [0]},
        "copies": COPIES,
        "shadow keys": {"mode": "shadow", "thresholds": str(shadow_folder), "dense_layers": [0]},
    }[kind]
    engine = pages(make_config, options, kv_transfer_config=KVTransferConfig(**CONNECTOR))
    assert engine.builder.has_connector

    @fuzz(25)
    @given(
        rows=st.lists(ROWS, min_size=2, max_size=3).filter(lambda rows: any(row.has_arrived for row in rows)),
        data=st.data(),
    )
    def check(rows: list[Row], data: st.DataObject) -> None:
        most = min(rows[0].context, rows[1].context) // BLOCK_SIZE
        num_shared = data.draw(st.integers(0, most))
        stayed = engine.answer(rows, num_shared, leaves=False)
        returned = engine.answer(rows, num_shared, leaves=True)
        for one, other in zip(returned, stayed, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    check()


@pytest.mark.parametrize("has_connector", [True, False])
def test_whoever_is_not_told_reads_what_pages_held_before(
    make_config: Callable[..., VllmConfig], has_connector: bool
) -> None:
    transfer = {"kv_transfer_config": KVTransferConfig(**CONNECTOR)} if has_connector else {}
    engine = pages(make_config, {"dense_layers": [0]}, **transfer)
    rows = [Row(300, 1, False, True), Row(200, 1, False, False)]
    # without a connector nothing is made again, whoever is told
    outputs = engine.answer(rows, 0, leaves=True, is_told=not has_connector)
    assert torch.isnan(outputs[1][0]).any()
    assert torch.isfinite(outputs[1][1]).all()
