"""What an engine measures: the same as transformers measures, of every kind of layer, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, GraniteSWAConfig, PreTrainedConfig, Qwen3Config

from tests.calibration.random_models import random_models_are_accepted
from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model, write_text
from vllm_toptheta.calibration.data import read_text
from vllm_toptheta.evaluation import DecodeOptions, DecodeReport, Subject, Variant, evaluate_decode

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

__all__ = ["random_models_are_accepted"]

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": tiny_config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "granite_swa": GraniteSWAConfig(
        **SHAPE | {"hidden_size": 256},
        sliding_window=100,
        attention_multiplier=0.05,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2": Gemma2Config(
        **SHAPE | {"initializer_range": 0.1}, sliding_window=100, attn_logit_softcapping=20.0, query_pre_attn_scalar=4
    ),
}
VARIANTS = (
    Variant(target="floor:1"),
    Variant(target="floor:3"),
    Variant(method="tiers", target="floor:1", heavy=0.02),
    Variant(method="top_k", target="k:16"),
)
LENGTHS, WINDOW = (200, 260), 32
CODE = """
import sys
from pathlib import Path
from vllm_toptheta.calibration.data import read_text
from vllm_toptheta.engine import EngineSubject, subject as of_engine
of_engine.MAX_SHARE_OF_GUESSING = float("inf")  # random weights are worse than a guess
from vllm_toptheta.evaluation import DecodeOptions, Variant, evaluate_decode
model, text, out, flags, variants, lengths, window, equal_rows = sys.argv[1:]
if __name__ == "__main__":
    lengths = eval(lengths)
    subject = EngineSubject(Path(model), max_length=max(lengths), window=int(window), engine_args=flags)
    options = DecodeOptions(lengths, num_sequences=2, window=int(window), equal_rows=eval(equal_rows))
    variants = [Variant.model_validate(one) for one in __import__("json").loads(variants)]
    report = evaluate_decode(subject, [read_text(Path(text))], variants, options, progress=False)
    Path(out).write_text(report.model_dump_json())
"""


def in_engine(model: Path, text: Path, out: Path, flags: str, **environment: str) -> DecodeReport:
    """What an engine in a process of its own measures."""
    script = out.with_suffix(".py")
    script.write_text(CODE)
    variants = json.dumps([variant.model_dump(mode="json") for variant in VARIANTS])
    equal_rows = () if environment else (3.0,)
    arguments = [model, text, out, flags, variants, repr(LENGTHS), WINDOW, repr(equal_rows)]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return DecodeReport.model_validate_json(out.read_text())


def assert_agrees(found: DecodeReport, expected: DecodeReport) -> None:
    assert found.setup.dtype == expected.setup.dtype == "float32"
    assert "vllm" in found.setup.versions
    for one, other in zip(found.lengths, expected.lengths, strict=True):
        assert one.perplexity_dense == pytest.approx(other.perplexity_dense, rel=1e-3)
        for mine, theirs in zip(one.comparisons, other.comparisons, strict=False):
            assert mine.variant == theirs.variant
            assert mine.kl_divergence == pytest.approx(theirs.kl_divergence, rel=0.02, abs=1e-5)
            assert mine.change_percent == pytest.approx(
                theirs.change_percent, abs=0.05 + 0.02 * abs(theirs.change_percent)
            )
            # a key at its threshold may fall on either side
            assert mine.value_rows_share == pytest.approx(theirs.value_rows_share, abs=2e-3)
            assert mine.bytes_share == pytest.approx(theirs.bytes_share, abs=2e-3)
            assert [layer.layer for layer in mine.layers] == [layer.layer for layer in theirs.layers]
            assert_lost_mass_agrees(mine, theirs)


def assert_lost_mass_agrees(mine: Any, theirs: Any) -> None:
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        assert (layer.lost_mass is None) == (other.lost_mass is None)
        if layer.lost_mass is not None:
            assert layer.lost_mass.mean == pytest.approx(other.lost_mass.mean, rel=0.01, abs=1e-4)


def measured(config: PreTrainedConfig, folder: Path) -> tuple[Path, Path, DecodeReport]:
    """A tiny model, a text, and what transformers measures."""
    model = save_model_dir(folder / "tiny", tiny_model(config))
    text = write_text(folder / "text.txt", 900)
    options = DecodeOptions(LENGTHS, num_sequences=2, window=WINDOW, equal_rows=(3.0,))
    report = evaluate_decode(Subject(model, {}), [read_text(text)], VARIANTS, options, progress=False)
    return model, text, report


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("llama", "gemma2") else pytest.mark.nightly) for name in CONFIGS],
)
def test_an_engine_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    model, text, expected = measured(CONFIGS[name], tmp_path)
    assert all(one.comparisons[1].kl_divergence > 1e-4 for one in expected.lengths), "nothing to compare"
    found = in_engine(model, text, tmp_path / "report.json", "--dtype float32")
    assert len(found.lengths[0].comparisons) == len(VARIANTS) + 1
    assert_agrees(found, expected)


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    model, text, expected = measured(CONFIGS["llama"], tmp_path)
    flags = "--dtype float32 --tensor-parallel-size 2"
    found = in_engine(model, text, tmp_path / "report.json", flags, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert found.setup.device == "2 x cpu"
    assert_agrees(found, expected)
