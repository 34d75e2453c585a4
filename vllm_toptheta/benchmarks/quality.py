"""What the GPU's decode kernel changes in a real model's predictions, beside what the reference changes.

A text runs through transformers once for each kind of attention. The kernel sees every row of the text as a sequence
of its own that decodes its last token, all of them on the same pages: as many sequences as the text has tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, Field

from vllm_toptheta.calibration.data import different_texts, load_sequences, read_text
from vllm_toptheta.calibration.model import hidden_states, load_model, load_tokenizer, overriding_attention
from vllm_toptheta.calibration.override import AttentionCall, DenseOverride
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.evaluation.losses import compare_predictions, head_of
from vllm_toptheta.evaluation.paired import compare_perplexities
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import ReadCounts, SparseOverride
from vllm_toptheta.evaluation.variants import Variant, expand_variants, floor_label, store_of
from vllm_toptheta.kernels.contract import (
    Counters,
    DecodeStep,
    Layer,
    LayerCache,
    LayerCall,
    LayerThresholds,
    TailStep,
)
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.kernels.pages import padded_page_bytes
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.store import ThresholdStore, read_architecture

if TYPE_CHECKING:
    from rich.table import Table

BLOCK_SIZE = 16


class KernelQuality(BaseModel):
    """One target or floor; changes are of the perplexity against dense attention on the same text, percent."""

    target: str
    reference_change: float
    reference_error: float | None = Field(description="Standard error of the change; none for a single sequence.")
    kernel_change: float
    kernel_error: float | None
    reference_rows_share: float = Field(description="Value rows read over cached, of the rows that are thresholded.")
    kernel_rows_share: float = Field(description="The same, counted by the kernel; open pages count as read.")
    kl_divergence: float = Field(description="KL(reference || kernel) of the next token, nats.")
    top1_agreement: float = Field(description="Share of tokens for which reference and kernel predict the same.")


class KernelQualityReport(BaseModel):
    """A comparison on one GPU."""

    model: str
    thresholds: str | None = Field(description="The model of the store; None where thresholds need none.")
    text: list[str]
    num_sequences: int
    length: int
    dtype: str
    device: str
    dense_perplexity: float
    qualities: list[KernelQuality]


class KernelOverride(DenseOverride):
    """The decode kernel in the sparse layers, dense attention in the others.

    Args:
        thresholds: Those of the kernel.
        dense_layers: Layers that are dense.
    """

    def __init__(self, thresholds: ServedThresholds, dense_layers: Collection[int]) -> None:
        self.thresholds = thresholds
        self.dense_layers = frozenset(dense_layers)
        self.rows_read = 0
        self.rows_cached = 0

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """See `AttentionOverride.attend`."""
        if call.layer_idx in self.dense_layers:
            return super().attend(call)
        query, key, value = call.query, call.key, call.value
        seq_len, num_heads, head_size = query.shape
        num_kv_heads = key.shape[1]
        kv_cache = _paged(key, value)
        pages = torch.arange(len(kv_cache), dtype=torch.int32, device=query.device)[None]
        counters = Counters.allocate(num_heads, num_kv_heads, query.device)
        coefficients = torch.from_numpy(self.thresholds.of_heads(call.layer_idx, slice(0, num_heads))).to(query.device)
        thresholds = LayerThresholds(coefficients, self.thresholds.is_relative)
        layer = Layer(call.softmax_scale, call.soft_cap, thresholds=thresholds, counters=counters, sinks=call.sinks)
        cache = LayerCache.of(kv_cache, layer)
        whole = torch.tensor([0, seq_len], dtype=torch.int32, device=query.device)
        write_tails(TailStep(pages, whole[1:], whole, seq_len), cache, layer)
        step = DecodeStep(
            pages.expand(seq_len, -1),
            torch.arange(1, seq_len + 1, dtype=torch.int32, device=query.device),
            max_dense_len=self.thresholds.max_dense_len,
            length_range=self.thresholds.length_range,
        )
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        sizes = Sizes(seq_len, num_heads, num_kv_heads, head_size)
        scratch = Scratch.allocate(sizes, kv_dtype=key.dtype, device=query.device)
        decode(step, LayerCall(query.contiguous(), output, cache, layer), scratch)
        dense_rows = num_kv_heads * sum(range(min(self.thresholds.max_dense_len, seq_len) + 1))
        self.rows_read += int(counters.value_rows_read.sum()) - dense_rows
        self.rows_cached += num_kv_heads * int(counters.totals[2]) - dense_rows
        return output

    @property
    def rows_share(self) -> float:
        """Value rows read over cached, of the rows that are thresholded."""
        return self.rows_read / max(self.rows_cached, 1)


def measure(
    model_dir: Path,
    texts: Sequence[Path],
    thresholds: ThresholdStore | None = None,
    *,
    targets: Sequence[str] = (),
    length: int = 2048,
    num_sequences: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> KernelQualityReport:
    """Compare dense attention, the reference and the kernel on the same sequences.

    Args:
        model_dir: A Hugging Face model directory, with its tokenizer.
        texts: UTF-8 text files that the thresholds were not calibrated on.
        thresholds: A store calibrated for the model; None where every target is a floor.
        targets: What to compare, by label: floor:2, k:64; none for the floor that is served if nothing is said.
        length: Tokens of a sequence.
        num_sequences: Sequences to compare on.
        seed: Chooses the sequences out of the texts.
        dtype: Of weights, activations and cache; the reference's attention is float32 whatever it is.

    Raises:
        BenchmarkError: There is no GPU.
        CalibrationError: A text cannot be used, or the model is not supported.
        EvaluationError: A target needs a store, and there is none; or it is no floor.
        FingerprintMismatch: The thresholds are those of another architecture.
        TargetOutOfRange: A target was not calibrated.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError("the decode kernel runs on NVIDIA GPUs only, and there is none")
    architecture = read_architecture(model_dir)
    stores = {} if thresholds is None else {"": thresholds}
    if thresholds is not None:
        thresholds.manifest.architecture.check(architecture, file=thresholds.folder)
    default = floor_label(DEFAULT_WEIGHT_FLOOR, field="targets")
    variants = expand_variants(stores, targets=targets or [default])
    read = different_texts([read_text(file) for file in texts])
    sequences = load_sequences(
        read, load_tokenizer(model_dir), num_sequences=num_sequences, max_length=length, seed=seed
    )
    attentions = [
        SparseAttention(variant, store_of(variant, stores), max_length=length, device="cuda") for variant in variants
    ]
    counts = [ReadCounts(length, device="cuda") for _ in attentions]
    references = [SparseOverride(attention, counts=count) for attention, count in zip(attentions, counts, strict=True)]
    kernels = [
        KernelOverride(
            served_thresholds(attention.variant, store_of(attention.variant, stores)), attention.dense_layers
        )
        for attention in attentions
    ]
    model = load_model(model_dir, dtype=dtype, device="cuda")
    check_understanding(model, sequences, model_dir=model_dir)
    head = head_of(model, sequences[0])
    against_dense, against_reference = [], []
    for sequence in sequences:
        states = []
        for override in (DenseOverride(), *references, *kernels):
            with overriding_attention(model, override):
                states.append(hidden_states(model, sequence))
        against_dense.append(compare_predictions(head, sequence, states[0], states[1:]))
        against_reference.append(
            [
                compare_predictions(head, sequence, states[1 + index], [states[1 + len(variants) + index]])[0]
                for index in range(len(variants))
            ]
        )
    dense = [losses[0].dense for losses in against_dense]
    num_tokens = [losses[0].num_tokens for losses in against_dense]
    qualities = []
    for index, variant in enumerate(variants):
        reference = compare_perplexities(dense, [losses[index].sparse for losses in against_dense], num_tokens)
        kernel = compare_perplexities(
            dense, [losses[len(variants) + index].sparse for losses in against_dense], num_tokens
        )
        between = [losses[index] for losses in against_reference]
        qualities.append(
            KernelQuality(
                target=variant.target,
                reference_change=reference[0],
                reference_error=reference[1],
                kernel_change=kernel[0],
                kernel_error=kernel[1],
                reference_rows_share=counts[index].value_rows_share,
                kernel_rows_share=kernels[index].rows_share,
                kl_divergence=statistics.mean(losses.kl_divergence for losses in between),
                top1_agreement=statistics.mean(losses.top1_agreement for losses in between),
            )
        )
    return KernelQualityReport(
        model=model_dir.absolute().name,
        thresholds=None if thresholds is None else thresholds.manifest.model.id,
        text=[text.source.name for text in read],
        num_sequences=num_sequences,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(),
        dense_perplexity=math.exp(statistics.mean(dense)),
        qualities=qualities,
    )


def served_thresholds(variant: Variant, store: ThresholdStore | None) -> ServedThresholds:
    """Those that a server has where the reference has `variant`.

    Args:
        variant: Of mode `values`, with a floor above 0.
        store: What `store_of` returns for it.

    Raises:
        BenchmarkError: The floor is 0, which is dense attention, or a calibrated target has no store.
        TargetOutOfRange: The target was not calibrated.
    """
    if variant.weight_floor == 0:
        raise BenchmarkError("a floor of 0 is dense attention", field="targets", remedy="Ask for floors above 0")
    if variant.weight_floor is not None:
        return ServedThresholds.relative(variant.weight_floor)
    if store is None:
        raise BenchmarkError(
            f"{variant.target} needs a store", field="thresholds", remedy="Give one, or ask for floors"
        )
    return ServedThresholds.calibrated(store.curve_of(variant.target))


def kernel_quality_table(report: KernelQualityReport) -> Table:
    """The report as a table."""
    from rich.table import Table

    of_store = "" if report.thresholds is None else f"thresholds of {report.thresholds}; "
    table = Table(
        title=f"{report.model}, {report.num_sequences} sequences of {report.length}, {report.dtype}, "
        f"dense perplexity {report.dense_perplexity:.3f}",
        caption=f"{report.device}; {of_store}text {', '.join(report.text)}",
    )
    for heading in (
        "target",
        "reference %",
        "+-",
        "kernel %",
        "+-",
        "rows read %, reference",
        "rows read %, kernel",
        "KL between",
        "top-1 equal %",
    ):
        table.add_column(heading, justify="right")
    for quality in report.qualities:
        table.add_row(
            quality.target,
            f"{quality.reference_change:+.2f}",
            "" if quality.reference_error is None else f"{quality.reference_error:.2f}",
            f"{quality.kernel_change:+.2f}",
            "" if quality.kernel_error is None else f"{quality.kernel_error:.2f}",
            f"{100 * quality.reference_rows_share:.1f}",
            f"{100 * quality.kernel_rows_share:.1f}",
            f"{quality.kl_divergence:.5f}",
            f"{100 * quality.top1_agreement:.2f}",
        )
    return table


def _paged(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Keys and values, [seq_len, num_kv_heads, head_size] each, in consecutive pages with room for tails."""
    seq_len, num_kv_heads, head_size = key.shape
    num_pages, width = -(-seq_len // BLOCK_SIZE), 2 * head_size
    content = BLOCK_SIZE * num_kv_heads * width
    stride = padded_page_bytes(content * key.element_size(), num_kv_heads, head_size) // key.element_size()
    memory = torch.zeros(num_pages, stride, dtype=key.dtype, device=key.device)
    rows = memory[:, :content].view(num_pages, BLOCK_SIZE, num_kv_heads, width)
    tokens = torch.zeros(num_pages * BLOCK_SIZE, num_kv_heads, width, dtype=key.dtype, device=key.device)
    tokens[:seq_len] = torch.cat([key, value], dim=-1)
    rows.copy_(tokens.view(rows.shape))
    return rows.transpose(1, 2)
