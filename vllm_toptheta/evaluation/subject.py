"""The model under evaluation with the thresholds to try on it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vllm_toptheta.calibration.model import load_model, load_tokenizer, served_dtype, usable_device
from vllm_toptheta.calibration.model_input import max_positions
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.run import package_versions
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.measuring import SequenceJob, TransformersDecoder, WindowResult, measure_sequence
from vllm_toptheta.reference import Placement
from vllm_toptheta.store import Architecture, ThresholdStore, read_architecture
from vllm_toptheta.store.quality import UNQUANTIZED

__all__ = ["DecodedSubject", "Setup", "StoreSummary", "Subject"]

_DTYPES = ("float32", "bfloat16", "float16")


class StoreSummary(BaseModel):
    """The thresholds behind a label."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    model_id: str = Field(description="Model that the thresholds were calibrated for.")
    content_sha256: str = Field(description="Of the manifest.")
    placement: Placement
    dense_layers: tuple[int, ...]


class Setup(BaseModel):
    """What was evaluated, and in what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Name of the model's directory.")
    stores: tuple[StoreSummary, ...] = Field(description="Those of calibrated thresholds; none are needed for others.")
    dtype: str = Field(description="Of weights and activations; attention is float32 whatever it is.")
    device: str
    versions: dict[str, str]


class DecodedSubject(Protocol):
    """A model whose decoding is evaluated: what runs it is its own business."""

    @property
    def model_dir(self) -> Path:
        """Its directory."""

    @property
    def architecture(self) -> Architecture:
        """What config.json says of its attention."""

    @property
    def stores(self) -> Mapping[str, ThresholdStore]:
        """Threshold stores by their labels."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence; None where that is not known."""

    @property
    def quantization(self) -> str:
        """Of the weights, as vLLM names it; `none` without."""

    def setup(self) -> Setup:
        """Returns what a report says of the subject."""

    def check(self, sequences: Sequence[Tensor]) -> None:
        """Refuses sequences, `[length]` int64 each, that the model cannot read or does not understand."""

    def measure(self, job: SequenceJob, *, advance: Callable[[int], object]) -> list[WindowResult]:
        """Measures one sequence, see `measuring.measure_sequence`."""


class Subject:
    """A model directory and threshold stores that fit it; the model is loaded when it is first needed.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        stores: threshold stores by their labels; none where nothing calibrated is tried.
        device: torch's name of the device to run on; `auto` is a GPU where there is one.
        dtype: of the weights and activations; `auto` is that in which vLLM serves the model.

    Raises:
        CalibrationError: there is no such device, or transformers cannot read config.json.
        EvaluationError: there is no such dtype.
        FingerprintMismatch: thresholds are those of another architecture.
        ModelConfigError: the model directory has no usable config.json.
    """

    def __init__(
        self, model_dir: Path, stores: Mapping[str, ThresholdStore], *, device: str = "auto", dtype: str = "float32"
    ) -> None:
        self.architecture = read_architecture(model_dir)
        for store in stores.values():
            store.manifest.architecture.check(self.architecture, file=store.folder)
        if dtype == "auto":
            dtype = str(served_dtype(model_dir)).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise EvaluationError(f"unknown dtype {dtype!r}", field="dtype", remedy=f"Choose {', '.join(_DTYPES)}")
        self.model_dir = model_dir
        self.stores = dict(stores)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = usable_device(device)
        self.dtype = dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.model_dir)

    @cached_property
    def model(self) -> Any:
        """The model, on its device and in evaluation mode."""
        return load_model(self.model_dir, dtype=getattr(torch, self.dtype), device=self.device)

    @cached_property
    def _decoder(self) -> TransformersDecoder:
        return TransformersDecoder(self.model)

    @property
    def max_length(self) -> int | None:
        """Positions of the model; None where its config names none."""
        return max_positions(self.model)

    @property
    def quantization(self) -> str:
        """Of the weights, as config.json names it; `none` without."""
        quantization = getattr(self.model.config, "quantization_config", None) or {}
        return str(quantization.get("quant_method", UNQUANTIZED))

    def check(self, sequences: Sequence[Tensor]) -> None:
        """See `calibration.plausible.check_understanding`."""
        check_understanding(self.model, sequences, model_dir=self.model_dir)

    def measure(self, job: SequenceJob, *, advance: Callable[[int], object] = lambda rows: None) -> list[WindowResult]:
        """Measures one sequence, see `measuring.measure_sequence`."""
        return measure_sequence(self._decoder, job, self.stores, advance=advance)

    def setup(self) -> Setup:
        """Returns what a report says of the subject."""
        return Setup(
            model=self.model_dir.absolute().name,
            stores=tuple(
                StoreSummary(
                    label=label,
                    model_id=store.manifest.model.id,
                    content_sha256=store.manifest.content_sha256,
                    placement=store.manifest.placement,
                    dense_layers=store.manifest.dense_layers,
                )
                for label, store in self.stores.items()
            ),
            dtype=self.dtype,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            versions=package_versions(),
        )
