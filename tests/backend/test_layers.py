"""Which layers write the tails of pages that several layers read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_toptheta.backend.layers import choose_tail_writers


def name_of(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


@pytest.mark.parametrize(("dense", "writers"), [((), {2, 9}), ((9,), {2, 10}), ((9, 10), {2, 11}), ((2,), {9})])
def test_the_first_sparse_layer_on_a_page_writes_its_tail(dense: tuple[int, ...], writers: set[int]) -> None:
    """Layers 10 and 11 read the pages of layer 9."""
    targets = {11: name_of(9), 2: None, 10: name_of(9), 9: None}
    layers = {
        name_of(index): SimpleNamespace(
            kv_sharing_target_layer_name=target,
            impl=SimpleNamespace(layer_plan=None if index in dense else object(), writes_tails=True),
        )
        for index, target in targets.items()
    }
    choose_tail_writers(layers)
    assert {index for index in targets if layers[name_of(index)].impl.writes_tails} - set(dense) == writers
