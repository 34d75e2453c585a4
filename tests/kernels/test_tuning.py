"""The table of launch parameters: what is looked up, and what writing an entry leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_toptheta.kernels.gpu import tuning
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, ShadowConfig, launch_config, save_entry


def test_entries_say_only_what_differs(tmp_path: Path) -> None:
    table = _copy(tmp_path)
    before = json.loads(table.read_text())
    save_entry(64, 2, "sm120", LaunchConfig(tile=128), table)
    assert json.loads(table.read_text()) == before | {"sm120, head size 64, 16 bit": {"tile": 128}}


def test_a_card_without_an_entry_takes_the_tuned_ones() -> None:
    tuned = launch_config(256, 2, "cpu")
    assert tuned != LaunchConfig()
    assert launch_config(128, 2, "cpu") == LaunchConfig()


def test_a_cards_own_entry_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = _copy(tmp_path)
    save_entry(256, 2, "sm120", LaunchConfig(tile=32), table)
    monkeypatch.setattr(tuning, "_table", lambda: tuning._read(table))
    monkeypatch.setattr(tuning, "card_name", lambda device: "sm120")
    assert launch_config(256, 2, "cpu") == LaunchConfig(tile=32)
    assert launch_config(256, 1, "cpu") == tuning._read(table)["sm90, head size 256, 8 bit"]


def _copy(folder: Path) -> Path:
    table = folder / "table.json"
    table.write_text(tuning.TABLE.read_text())
    return table


@pytest.mark.parametrize(
    ("num_seqs", "length", "scans"),
    [(1, 15_999, False), (1, 16_000, True), (15, 1000, False), (16, 1000, True), (1000, 999, False)],
)
def test_steps_that_are_long_enough_are_scanned(num_seqs: int, length: int, scans: bool) -> None:
    config = ShadowConfig(few_tokens=500, short_length=1000)
    assert config.scans(num_seqs, length, num_programs=32) is scans
    assert config.scanning.scans(1, 1, num_programs=32)
