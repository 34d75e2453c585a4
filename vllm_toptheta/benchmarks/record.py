"""Records what the query heads of a real model keep at the end of a long context, for benchmarks to replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.benchmarks.patterns import CLUSTER_TOKENS, PatternInfo, Recorded
from vllm_toptheta.calibration.data import different_texts, load_sequences, read_text
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.evaluation import DecodeOptions, Subject, Variant, floor_label
from vllm_toptheta.evaluation.decode import check_options
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.window import read_prefix, read_window
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR
from vllm_toptheta.reference import AttentionResult

ROW_DISTANCE = 16  # tokens between recorded rows: those of neighbours keep much the same keys


def record(
    subject: Subject,
    texts: Sequence[Path],
    *,
    length: int,
    num_rows: int = 2,
    weight_floor: float = DEFAULT_WEIGHT_FLOOR,
    seed: int = 0,
    progress: bool = True,
) -> Recorded:
    """Reads a prompt densely, and decodes its last tokens with thresholds relative to the row.

    Args:
        subject: The model.
        texts: Text files; one sequence is cut from them.
        length: Tokens of the sequence, which the last recorded row sees.
        num_rows: Rows to record of each layer, `ROW_DISTANCE` tokens apart.
        weight_floor: Of the thresholds, above 0.
        seed: Chooses the sequence.
        progress: Show a progress bar on stderr.

    Raises:
        BenchmarkError: There is no row to record, or nothing is thresholded.
        CalibrationError: The model is not supported, or the texts are too short.
        EvaluationError: The length or the floor cannot be.
    """
    if num_rows < 1:
        raise BenchmarkError(f"no number of rows: {num_rows}", field="rows")
    if weight_floor == 0:
        raise BenchmarkError("a floor of 0 keeps every key", field="weight_floor", remedy="Give one above 0")
    variant = Variant(target=floor_label(weight_floor, field="weight_floor"))
    window = num_rows * ROW_DISTANCE
    check_options(subject, DecodeOptions((length,), num_sequences=1, window=window))
    attention = SparseAttention(variant, max_length=length, device=subject.device)
    if attention.dense_length > length - window:
        raise BenchmarkError(
            f"rows of at most {attention.dense_length} tokens keep every key",
            field="length",
            remedy=f"Record at least {attention.dense_length + window} tokens",
        )
    read = different_texts([read_text(file) for file in texts])
    (token_ids,) = load_sequences(read, subject.tokenizer, num_sequences=1, max_length=length, seed=seed)
    check_understanding(subject.model, [token_ids], model_dir=subject.model_dir)
    recorder = _Recorder(range(length - window + ROW_DISTANCE, length + 1, ROW_DISTANCE))
    with progress_bar("tokens", enabled=progress) as bar:
        task = bar.add_task("reading", total=length)
        cache = read_prefix(subject.model, token_ids[:-window], on_rows=lambda rows: bar.advance(task, rows))
        read_window(subject.model, cache, token_ids[-window:], attention, observe=recorder)
        bar.advance(task, window)
    if not recorder.kept:
        raise BenchmarkError("every layer has a sliding window, and those keep what they see", file=subject.model_dir)
    architecture = subject.architecture
    info = PatternInfo(
        model=subject.model_dir.absolute().name,
        text=tuple(text.source.name for text in read),
        weight_floor=weight_floor,
        layers=tuple(sorted(recorder.kept)),
        row_lengths=tuple(recorder.row_lengths),
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        rows_read_share=recorder.rows_read / recorder.rows_cached,
    )
    return Recorded(info, tuple(tuple(recorder.kept[layer]) for layer in info.layers))


def summary(pattern: Recorded) -> str:
    """What a pattern is like: how many keys are kept, how unevenly, and in long rows how close together."""
    info = pattern.info
    counts = np.array([len(head) for layer in pattern.kept for row in layer for head in row])
    least, median, p99, most = np.percentile(counts, [0, 50, 99, 100])
    fullest = []
    group = info.num_heads // info.num_kv_heads
    for layer in pattern.kept:
        for length, row in zip(info.row_lengths, layer, strict=True):
            for head in range(0, info.num_heads, group):
                rows_read = np.unique(np.concatenate(row[head : head + group]))
                in_clusters = np.bincount(rows_read // CLUSTER_TOKENS)
                fullest.append(in_clusters.max() / (len(rows_read) * CLUSTER_TOKENS / length))
    kept = (
        f"{pattern.name}: {100 * info.rows_read_share:.1f} % of the value rows are read; a head keeps {least:,.0f} to "
        f"{most:,.0f} keys, median {median:,.0f}, p99 {p99:,.0f}"
    )
    if min(info.row_lengths) < 4 * CLUSTER_TOKENS:
        return kept
    middle, p90 = np.percentile(fullest, [50, 90])
    return f"{kept}\nthe fullest {CLUSTER_TOKENS:,} tokens hold {middle:.1f} times the mean (median), p90 {p90:.1f}"


class _Recorder:
    """Takes rows of these lengths out of a window; an observer of `window.read_window`."""

    def __init__(self, row_lengths: Sequence[int]) -> None:
        self.row_lengths = row_lengths
        self.kept: dict[int, list[tuple[NDArray[np.int64], ...]]] = {}
        self.rows_read = self.rows_cached = 0

    def __call__(self, call: AttentionCall, result: AttentionResult | None) -> None:
        """See `window.read_window`."""
        if result is None or result.survivors is None:
            return
        first = call.num_before + 1
        for row, survivors in enumerate(result.survivors):
            length = first + row
            if length in self.row_lengths:
                kept = tuple(np.flatnonzero(head) for head in survivors[:, :length].cpu().numpy())
                self.kept.setdefault(call.layer_idx, []).append(kept)
                self.rows_read += int(result.value_rows_read[row].sum())
                self.rows_cached += length * result.value_rows_read.shape[1]
