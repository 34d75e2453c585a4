"""Every error that this package raises on purpose.

TopThetaError
  SettingsError               an option is unknown, malformed or contradicts another
  ModelConfigError            a model's config.json lacks, or misstates, what the fingerprint needs
  StoreError                  thresholds cannot be found, read, trusted or written
    StoreNotFound             no thresholds for this model where we were told to look
    StoreUnreadable           a file of the store is missing, not a regular file, or a link out of the folder
    StoreTooLarge             a file of the store is larger than any honest one
    StoreNotWritable          the store cannot be saved there
    ManifestInvalid           manifest.yaml is not YAML, or not what the schema says
    ManifestVersion           manifest.yaml follows another version of the schema
    ChecksumMismatch          thresholds.safetensors is not the file that the manifest describes
    TensorsInvalid            thresholds.safetensors has the right checksum, yet its content is wrong
      TensorHeaderInvalid     its header is malformed
      TensorNames             a tensor is missing, or there is one too many
      TensorShape             a tensor has another shape than the manifest implies
      TensorDtype             a tensor has another dtype than the format prescribes
      TensorNotFinite         a tensor contains NaN or infinity
      TensorValues            a tensor's numbers contradict each other or the manifest
    FingerprintMismatch       the thresholds were calibrated on another architecture
    TargetOutOfRange          the thresholds were not calibrated for the target asked for
    ExpectationsMissing       the thresholds came without a measurement of what they discard
    ShadowMissing             the thresholds came without shadow keys
  CalibrationError            thresholds cannot be calibrated with this model and this text
    CheckpointError           a model's weights are damaged, or not those that its config.json describes
  EvaluationError             an evaluation cannot run, or would not measure what it says
    PromiseNotKept            what was measured does not keep what tune promises
  ReportError                 a report cannot be drawn or written
  ConversionError             a model directory cannot be made of the weights that a Python package carries
  BenchmarkError              a benchmark could not run
  SoakError                   a server under test does not start, or cannot be asked what is needed
  UnsupportedError            the backend does not support a feature of the model or the engine

May import nothing of the package.
"""

from __future__ import annotations

import re
from pathlib import Path

# file names and YAML keys can carry terminal escapes and lone surrogates into a message; a newline may be ours
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class TopThetaError(Exception):
    """What went wrong, where, and what to do about it.

    Its string is one message made of all four parts. It pickles, because vLLM's processes pass errors to each other.

    Args:
        message: What is wrong, without file and field.
        file: The file or folder concerned.
        field: The field in that file, the option or the tensor concerned.
        remedy: What the reader can do, as a sentence.
    """

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else Path(file)
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        place = [str(part) for part in (self.file, self.field) if part is not None]
        sentences = [part.rstrip(".") + "." for part in (self.message, self.remedy) if part]
        text = ": ".join([*place, " ".join(sentences)])
        return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.file, self.field, self.remedy)


def _rebuild(
    kind: type[TopThetaError], message: str, file: Path | None, field: str | None, remedy: str | None
) -> TopThetaError:
    return kind(message, file=file, field=field, remedy=remedy)


class SettingsError(TopThetaError):
    """An option is unknown, malformed or contradicts another."""


class ModelConfigError(TopThetaError):
    """A model's config.json lacks, or misstates, what the fingerprint needs."""


class StoreError(TopThetaError):
    """Thresholds cannot be found, read, trusted or written."""


class StoreNotFound(StoreError):
    """No thresholds for this model where we were told to look."""


class StoreUnreadable(StoreError):
    """A file of the store is missing, not a regular file, or a link out of the folder."""


class StoreTooLarge(StoreError):
    """A file of the store is larger than any honest one."""


class StoreNotWritable(StoreError):
    """The store cannot be saved there."""


class ManifestInvalid(StoreError):
    """manifest.yaml is not YAML, or not what the schema says."""


class ManifestVersion(StoreError):
    """manifest.yaml follows another version of the schema."""


class ChecksumMismatch(StoreError):
    """A file of the store was changed after it was written."""


class TensorsInvalid(StoreError):
    """thresholds.safetensors has the right checksum, yet its content is wrong."""


class TensorHeaderInvalid(TensorsInvalid):
    """The safetensors header is malformed."""


class TensorNames(TensorsInvalid):
    """A tensor is missing, or there is one too many."""


class TensorShape(TensorsInvalid):
    """A tensor has another shape than the manifest implies."""


class TensorDtype(TensorsInvalid):
    """A tensor has another dtype than the format prescribes."""


class TensorNotFinite(TensorsInvalid):
    """A tensor contains NaN or infinity."""


class TensorValues(TensorsInvalid):
    """A tensor's numbers contradict each other or the manifest."""


class FingerprintMismatch(StoreError):
    """The thresholds were calibrated on another architecture."""


class TargetOutOfRange(StoreError):
    """The thresholds were not calibrated for the target asked for."""


class ExpectationsMissing(StoreError):
    """The thresholds came without a measurement of what they discard."""


class ShadowMissing(StoreError):
    """The thresholds came without shadow keys."""


class CalibrationError(TopThetaError):
    """Thresholds cannot be calibrated with this model and this text."""


class CheckpointError(CalibrationError):
    """A model's weights are damaged, or not those that its config.json describes."""


class EvaluationError(TopThetaError):
    """An evaluation cannot run, or would not measure what it says."""


class PromiseNotKept(EvaluationError):
    """All was measured that was asked for, and no floor can be said to keep the promise."""


class ReportError(TopThetaError):
    """A report cannot be drawn or written."""


class ConversionError(TopThetaError):
    """A model directory cannot be made of the weights that a Python package carries."""


class BenchmarkError(TopThetaError):
    """A benchmark could not run."""


class SoakError(TopThetaError):
    """A server under test does not start, or cannot be asked what is needed."""


class UnsupportedError(TopThetaError):
    """The backend does not support a feature of the model or the engine."""
