"""What weight floors were measured to cost on held-out text, and what a server may promise by it.

Promise     how much may be lost, the floor that keeps it, and what was measured with that floor
TaskProbe   what else was tried with that floor: questions that are shown, and not promised
Evidence    the promises of one mode, with all that their figures depend on: a section of the manifest
Serving     how a model is served: `Evidence.differences` says where that is not what was measured
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from vllm_toptheta.limits import MAX_WEIGHT_FLOOR
from vllm_toptheta.store.fields import (
    MAX_COUNT,
    MAX_LAYERS,
    PRINTABLE,
    Command,
    Count,
    Seed,
    Sha256,
    Share,
    ShortText,
    StrictModel,
    TextSource,
    Tokens,
    Versions,
)

# promises that requests can name: of perplexity, in percent
PRESETS: Final = {"exact": 0.05, "high": 0.2, "fast": 1.0}
UNQUANTIZED: Final = "none"
# share of a task's questions; a model that solves fewer even densely cannot show what a floor loses
_LEAST_SOLVED_DENSE: Final = 0.2
_SERVED_AS_MEASURED = "sdc+vmc"  # the compensation that floors are measured with

Loss = Annotated[float, Field(gt=0.0, le=100.0)]
Figure = Annotated[float, Field(ge=-1e9, le=1e9)]
Error = Annotated[float, Field(ge=0.0, le=1e9)]
NumQuestions = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Difference = Annotated[float, Field(ge=-1.0, le=1.0)]


class MeasuredText(TextSource):
    """A text that was measured on."""

    num_tokens: Count


class MeasuredLength(StrictModel):
    """What a floor cost at one length, against dense attention on the same tokens."""

    length: Tokens = Field(description="Tokens of a sequence.")
    num_sequences: Count
    num_tokens: Count = Field(description="Predicted tokens, over all sequences.")
    perplexity_dense: Figure
    change_percent: Figure = Field(description="Of the perplexity.")
    change_error: Error = Field(description="Its standard error, from the spread between sequences.")
    change_bound: Figure = Field(description="What it is below with the confidence of the evidence.")
    kl_divergence: Figure = Field(description="KL(dense || sparse) of the next token, mean over tokens, nats.")
    kl_error: Error
    kl_bound: Figure
    top1_agreement: Share
    value_rows_share: Share = Field(description="Value rows read exactly over those cached.")
    bytes_share: Error = Field(description="Bytes of the cache read over those that dense attention reads.")
    # without names: a mapping for each layer, length and promise would be more values than a manifest may have
    lost_mass_p99: Annotated[tuple[Share | None, ...], Field(strict=False, max_length=MAX_LAYERS)] | None = Field(
        default=None,
        description="Share of the softmax that one decoded token of a query head in a hundred loses more than, by "
        "layer; None of layers without thresholds, and of evidence from before it was recorded.",
    )


class TaskProbe(StrictModel):
    """How many questions of a task a floor solved, and dense attention of the same ones, at one length."""

    task: Literal["needle", "key-value"]
    length: Tokens = Field(description="Tokens that a question takes with its answer, at most.")
    num_questions: Count
    num_solved_dense: NumQuestions
    num_solved_sparse: NumQuestions
    num_gained: NumQuestions = Field(description="Solved with the floor only.")
    num_lost: NumQuestions = Field(description="Solved with dense attention only.")
    difference_low: Difference = Field(
        description="Lower end of the paired 95 % interval of the share solved with the floor less that solved densely."
    )
    difference_high: Difference = Field(description="Its upper end.")

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.num_solved_sparse - self.num_solved_dense != self.num_gained - self.num_lost:
            raise ValueError("what was gained and lost is not what the numbers solved differ by")
        if self.num_lost > self.num_solved_dense or self.num_solved_dense + self.num_gained > self.num_questions:
            raise ValueError("more questions than there are")
        if self.difference_low > self.difference_high:
            raise ValueError("an interval that ends before it begins")
        return self

    @property
    def difference(self) -> float:
        """The share of questions solved with the floor, less that solved densely."""
        return (self.num_solved_sparse - self.num_solved_dense) / self.num_questions

    @property
    def tells_nothing(self) -> bool:
        """Whether the model solves so little with dense attention that nothing can be seen to be lost."""
        return self.num_solved_dense < _LEAST_SOLVED_DENSE * self.num_questions

    @property
    def remark(self) -> str:
        """What a reader has to know of the figures, for people; empty where they can be taken as they are."""
        if not self.tells_nothing:
            return ""
        least = f"{100 * _LEAST_SOLVED_DENSE:g} %"
        return f"tells nothing of this model at this length: dense attention solves less than {least}"


class Promise(StrictModel):
    """How much may be lost, and the largest floor that was confirmed to lose less; or why there is none."""

    preset: Literal["exact", "high", "fast"] | None = Field(default=None, description="None of a user's own promise.")
    max_loss: Loss | None = Field(default=None, description="Of perplexity, percent.")
    max_kl: Loss | None = Field(default=None, description="Nats per token.")
    weight_floor: Annotated[float, Field(gt=0.0, le=MAX_WEIGHT_FLOOR)] | None = Field(
        default=None, description="None where no floor keeps it."
    )
    reason: Annotated[str, Field(min_length=1, max_length=2048, pattern=PRINTABLE)] | None = Field(
        default=None, description="Why no floor keeps it."
    )
    measured: Annotated[tuple[MeasuredLength, ...], Field(strict=False, max_length=64)] = Field(
        description="With the floor, on sequences that its choice did not see; empty without one."
    )
    # None rather than empty, so that the checksums of manifests from before there were any stay
    probes: Annotated[tuple[TaskProbe, ...], Field(strict=False, min_length=1, max_length=128)] | None = Field(
        default=None, description="Tasks tried with the floor, which promise nothing; None where none were."
    )

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.max_loss is None and self.max_kl is None:
            raise ValueError("a promise says how much may be lost")
        is_kept = self.weight_floor is not None
        if is_kept != bool(self.measured) or is_kept == (self.reason is not None):
            raise ValueError("a promise has a floor and figures, or a reason why it has none")
        probed = [(probe.task, probe.length) for probe in self.probes or ()]
        if probed and not is_kept:
            raise ValueError("probes: there is no floor to try")
        if len(set(probed)) < len(probed):
            raise ValueError("probes: a task is tried twice at one length")
        return self

    @property
    def text(self) -> str:
        """What is promised, in a few words."""
        of_loss = None if self.max_loss is None else f"perplexity within {self.max_loss:g} %"
        of_kl = None if self.max_kl is None else f"KL to dense attention within {self.max_kl:g}"
        return " and ".join(part for part in (of_loss, of_kl) if part)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequences measured; 0 where no floor keeps the promise."""
        return max((one.length for one in self.measured), default=0)

    @property
    def worst(self) -> MeasuredLength:
        """The length at which most was lost, of a promise that is kept: perplexity, or KL where only that counts."""
        of_kl = self.max_loss is None
        return max(self.measured, key=lambda one: one.kl_divergence if of_kl else one.change_percent)


class Evidence(StrictModel):
    """What was measured in one mode, and all that the figures depend on. The first promise kept is served."""

    mode: Literal["values", "shadow"]
    heavy: Share | None = Field(
        default=None, description="In mode shadow, what a key weighs at least to be read exactly, over the anchors."
    )
    weights_sha256: Sha256 | None = Field(
        default=None, description="See `store.weights_sha256`; None where there were no files of weights."
    )
    dtype: ShortText = Field(description="Of weights and activations; attention was float32.")
    quantization: ShortText = Field(description="Of the weights, as config.json names it; none without.")
    device: ShortText
    window: Tokens = Field(description="Tokens at the end of each sequence that were decoded; the others were dense.")
    confidence: float = Field(gt=0.5, lt=1.0, description="With which the bounds hold, one-sided.")
    seed: Seed
    text: Annotated[tuple[MeasuredText, ...], Field(strict=False, min_length=1, max_length=1024)]
    versions: Versions
    command: Command
    date: datetime.date
    promises: Annotated[tuple[Promise, ...], Field(strict=False, min_length=1, max_length=8)]

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if (self.mode == "shadow") != (self.heavy is not None):
            raise ValueError("heavy is of mode shadow")
        presets = [promise.preset for promise in self.promises]
        if len(set(presets)) < len(presets):
            raise ValueError("promises: one of them is made twice")
        if not any(promise.weight_floor for promise in self.promises):
            raise ValueError("promises: none is kept")
        if any(one.length <= self.window for promise in self.promises for one in promise.measured):
            raise ValueError("window: no prompt is left of the shortest sequences")
        return self

    @property
    def served(self) -> Promise:
        """What a server promises that is told nothing else."""
        return next(promise for promise in self.promises if promise.weight_floor is not None)

    @property
    def preset_floors(self) -> dict[str, float]:
        """The floors of presets that are kept, by name."""
        return {
            promise.preset: promise.weight_floor
            for promise in self.promises
            if promise.preset is not None and promise.weight_floor is not None
        }

    @property
    def dense_length(self) -> int:
        """Tokens up to which sequences have to be dense for the promise: nothing was measured of them.

        A floor loses more in short sequences than in long ones.
        """
        return min(one.length for one in self.served.measured) - self.window

    @property
    def lost_mass_p99(self) -> dict[int, float]:
        """The largest p99 of the lost mass over the lengths of the promise, by layer; empty if none was recorded.

        The largest, because a server counts sequences of all lengths together.
        """
        largest: dict[int, float] = {}
        for one in self.served.measured:
            for layer, mass in enumerate(one.lost_mass_p99 or ()):
                if mass is not None:
                    largest[layer] = max(mass, largest.get(layer, 0.0))
        return largest

    @property
    def line(self) -> str:
        """What is promised and by which figures, for people."""
        promise, worst = self.served, self.served.worst
        figures = []
        if promise.max_loss is not None:
            figures.append(f"{worst.change_percent:+.2f} +- {worst.change_error:.2f} %")
        if promise.max_kl is not None:
            figures.append(f"KL {worst.kl_divergence:.5f} +- {worst.kl_error:.5f}")
        texts = ", ".join(text.name for text in self.text[:3]) + (", ..." if len(self.text) > 3 else "")
        return (
            f"promised: {promise.text} up to {promise.max_length} tokens, measured {', '.join(figures)} at "
            f"{worst.length} tokens on {texts}"
        )

    def differences(self, serving: Serving) -> list[str]:
        """Say where a server is not what was measured, in a few words each.

        Args:
            serving: How the model is served; what is not known is not compared.
        """
        found: list[str] = []

        def compare(what: str, served: object, measured: object) -> None:
            if served is not None and served != measured:
                found.append(f"{what} {served}, measured with {measured}")

        if serving.weights_sha256 is not None and serving.weights_sha256 != self.weights_sha256:
            found.append("other weights than those measured")
        compare("dtype", serving.dtype, self.dtype)
        # vLLM names a faster kernel of the same format
        of_weights = None if serving.quantization is None else serving.quantization.removesuffix("_marlin")
        compare("quantization", of_weights, self.quantization)
        if serving.cache_dtype not in (None, "auto", serving.dtype):
            found.append(f"a KV cache in {serving.cache_dtype}, measured with that of the dtype")
        if serving.max_length is not None and serving.max_length > self.served.max_length:
            found.append(f"up to {serving.max_length} tokens, measured up to {self.served.max_length}")
        if serving.min_context is not None and serving.min_context < self.dense_length:
            found.append(f"sparse from {serving.min_context + 1} tokens on, measured from {self.dense_length + 1} on")
        compare("compensation", serving.compensation, _SERVED_AS_MEASURED)
        compare("heavy", serving.heavy, self.heavy)
        return found


@dataclass(frozen=True)
class Serving:
    """How a model is served; None is what is not known, or left to the evidence.

    Attributes:
        weights_sha256: See `store.weights_sha256`.
        dtype: Of weights and activations, as torch names it.
        quantization: Of the weights, as vLLM names it; `none` without.
        cache_dtype: Of the KV cache, as vLLM names it.
        max_length: Tokens of the longest sequence.
        min_context: Tokens up to which sequences are dense.
        compensation: As the settings name it.
        heavy: Of copies.
    """

    weights_sha256: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    cache_dtype: str | None = None
    max_length: int | None = None
    min_context: int | None = None
    compensation: str | None = None
    heavy: float | None = None
