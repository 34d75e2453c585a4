"""What `bench record` keeps of a model is what decoding keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.test_patterns import recorded
from tests.calibration.tiny_model import save_model_dir, write_text
from vllm_toptheta.benchmarks.patterns import Recorded
from vllm_toptheta.benchmarks.record import ROW_DISTANCE, record, summary
from vllm_toptheta.calibration.data import load_sequences, read_text
from vllm_toptheta.errors import BenchmarkError, EvaluationError
from vllm_toptheta.evaluation import Subject, Variant
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.window import read_prefix, read_window
from vllm_toptheta.evaluation.window_reads import WindowRecorder

LENGTH = 220


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("record") / "text.txt", 500)


@pytest.fixture(scope="module")
def subject(text: Path) -> Subject:
    return Subject(save_model_dir(text.parent / "tiny"), {}, device="cpu")


def test_rows_keep_what_decoding_keeps(subject: Subject, text: Path, tmp_path: Path) -> None:
    pattern = record(subject, [text], length=LENGTH, num_rows=3, weight_floor=1.5, progress=False)
    info = pattern.info
    assert info.row_lengths == (LENGTH - 2 * ROW_DISTANCE, LENGTH - ROW_DISTANCE, LENGTH)
    assert (info.model, info.text, info.weight_floor, info.layers) == ("tiny", ("text.txt",), 1.5, (0, 1, 2, 3))
    assert (info.num_heads, info.num_kv_heads) == (4, 2)

    (tokens,) = load_sequences([read_text(text)], subject.tokenizer, num_sequences=1, max_length=LENGTH, seed=0)
    window = 3 * ROW_DISTANCE
    cache = read_prefix(subject.model, tokens[:-window])
    recorder = WindowRecorder()
    attention = SparseAttention(Variant(target="floor:1.5"), max_length=LENGTH)
    read_window(subject.model, cache, tokens[-window:], attention, observe=recorder)
    reads = recorder.reads(range(LENGTH - window + 1, LENGTH + 1))
    rows = slice(ROW_DISTANCE - 1, None, ROW_DISTANCE)
    counts = np.array([[[len(head) for head in row] for row in layer] for layer in pattern.kept])
    assert (counts == reads.survivors[:, rows]).all()
    unions = np.array(
        [
            [[len(set(row[2 * head]) | set(row[2 * head + 1])) for head in range(2)] for row in layer]
            for layer in pattern.kept
        ]
    )
    assert (unions == reads.value_rows[:, rows]).all()
    assert info.rows_read_share == pytest.approx(unions.sum() / (4 * 2 * sum(info.row_lengths)))
    assert 0.05 < info.rows_read_share < 0.9

    pattern.save(tmp_path / "pattern.safetensors")
    loaded = Recorded.load(tmp_path / "pattern.safetensors")
    assert loaded.info == info
    assert loaded.name == "tiny, 220 tokens, floor:1.5"
    said = summary(loaded)
    assert said.startswith(
        f"tiny, 220 tokens, floor:1.5: {100 * info.rows_read_share:.1f} % of the value rows are read"
    )
    assert f"keeps {counts.min()} to {counts.max()} keys" in said
    assert "fullest" not in said
    assert loaded.kept[3][2][1].tolist() == pattern.kept[3][2][1].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_rows": 0}, BenchmarkError, "rows: no number of rows: 0"),
        ({"weight_floor": 0}, BenchmarkError, "weight_floor: a floor of 0 keeps every key"),
        ({"weight_floor": float("nan")}, EvaluationError, "weight_floor: no weight floor: nan"),
        ({"length": 150}, BenchmarkError, "length: rows of at most 144 tokens.*at least 176"),
        ({"length": 30}, EvaluationError, "lengths: no prompt is left"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    subject: Subject, text: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        record(subject, [text], **{"length": LENGTH, "progress": False, **options})


def test_the_summary_says_how_close_together_rows_are() -> None:
    generator = np.random.default_rng(0)
    # half of the rows in the last of eight stretches
    kept = tuple(
        np.sort(np.concatenate([generator.choice(7168, 50, replace=False), 7168 + generator.choice(1024, 50, False)]))
        for _ in range(4)
    )
    info = recorded((8192,), num_layers=1).info
    _, clusters = summary(Recorded(info, ((kept,),))).splitlines()
    assert clusters.startswith("the fullest 1,024 tokens hold 4.")
