"""Finds the largest weight floor that keeps a promise: chosen on some sequences, confirmed on others.

choose      all floors of a ladder on the same few sequences, whose dense prefixes they share
confirm     the largest floor that these let expect to keep the promise (choosing.py), with all below it, on others; one
            that fails gives way to the next lower one, on further unseen sequences

A promise is kept where what was lost is below it with 95 % confidence, at every length.
"""

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_toptheta.calibration.data import Text, different_texts, prompt_prefix, tokenise
from vllm_toptheta.errors import EvaluationError, PromiseNotKept
from vllm_toptheta.evaluation.choosing import expect
from vllm_toptheta.evaluation.decode import DecodeOptions, check_options, evaluate_decode
from vllm_toptheta.evaluation.decode_report import DecodeReport
from vllm_toptheta.evaluation.state_folder import naming_the_flag
from vllm_toptheta.evaluation.subject import DecodedSubject
from vllm_toptheta.evaluation.tuned import Tuned, measured_length
from vllm_toptheta.evaluation.variants import floor_label, floor_variant
from vllm_toptheta.store import Evidence, MeasuredLength, MeasuredText, Promise, weights_sha256

__all__ = ["CONFIDENCE", "FLOORS", "MIN_SEQUENCES", "Goal", "TuneOptions", "tune_floors"]

CONFIDENCE = 0.95
FLOORS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5)
# below, the spread between sequences says too little of the error
MIN_SEQUENCES = 4
# times that a floor can be confirmed on unseen sequences; each gives a wrong one another chance of 5 %
MAX_CONFIRMATIONS = 3


@dataclass(frozen=True)
class Goal:
    """How much may be lost at most; at least one of the two is given.

    Attributes:
        max_loss: of perplexity, percent.
        max_kl: KL divergence from dense attention, nats per token.
        preset: its name, if it has one.
    """

    max_loss: float | None = None
    max_kl: float | None = None
    preset: str | None = None

    def is_kept(self, measured: Sequence[MeasuredLength]) -> bool:
        """Whether what was lost is below, with confidence, at every length."""
        return not any(self._excess(one) > 0 for one in measured)

    def shortfall(self, label: str, measured: Sequence[MeasuredLength]) -> str:
        """Says by which figure a floor does not keep it, and what would help; of one that does not.

        Args:
            label: of the floor.
            measured: with that floor.
        """
        one = max(measured, key=self._excess)
        of_loss = self.max_loss is not None and one.change_bound > self.max_loss
        if of_loss:
            limit, mean, error, bound = self.max_loss or 0.0, one.change_percent, one.change_error, one.change_bound
            figure = f"perplexity changes by {mean:+.3f} +- {error:.3f} %, by up to {bound:+.3f} %"
        else:
            limit, mean, error, bound = self.max_kl or 0.0, one.kl_divergence, one.kl_error, one.kl_bound
            figure = f"KL to dense attention is {mean:.2g} +- {error:.2g}, up to {bound:.2g}"
        found = (
            f"with {label} at {one.length} tokens, {figure} with {CONFIDENCE:.0%} confidence "
            f"({one.num_sequences} sequences, {one.num_tokens} tokens), and {limit:g}{' %' if of_loss else ''} is "
            "promised"
        )
        if mean >= limit:
            return f"{found}; the mean is above the promise"
        enough = math.ceil(one.num_sequences * ((bound - mean) / (limit - mean)) ** 2)
        return f"{found}; about {enough} sequences could decide"

    def _excess(self, one: MeasuredLength) -> float:
        """By how many times the promise a bound is above it; 0 or less where it is kept."""
        of_loss = -math.inf if self.max_loss is None else one.change_bound / self.max_loss - 1
        of_kl = -math.inf if self.max_kl is None else one.kl_bound / self.max_kl - 1
        return max(of_loss, of_kl)


@dataclass(frozen=True)
class TuneOptions:
    """What to find and on how much text.

    Attributes:
        goals: at least one; without a preset, it must be kept, and of the others one.
        lengths: tokens of the sequences; a promise is kept at all of them.
        num_sequences: for each confirmation, at least 4; half as many, but 4 at least, to choose on.
        window: tokens at the end of a sequence that are decoded.
        floors: what to try, ascending, in multiples of the average weight.
        heavy: in mode shadow, what a key must weigh to be read exactly; None for mode values.
        equal_rows: floors beside which exact top-k is measured that reads as many value rows; of mode values only.
        seed: chooses the sequences.
    """

    goals: tuple[Goal, ...]
    lengths: tuple[int, ...]
    num_sequences: int = 8
    window: int = 256
    floors: tuple[float, ...] = FLOORS
    heavy: float | None = None
    equal_rows: tuple[float, ...] = ()
    seed: int = 0

    @property
    def num_to_choose(self) -> int:
        """Sequences to choose on: what they show need not hold, for it is confirmed."""
        return max(MIN_SEQUENCES, self.num_sequences // 2)


def tune_floors(
    subject: DecodedSubject,
    texts: Sequence[Text],
    options: TuneOptions,
    *,
    command: str,
    folder: Path | None = None,
    progress: bool = True,
    show: Callable[[DecodeReport], None] | None = None,
) -> Tuned:
    """Finds the largest floors that keep promises.

    Args:
        subject: the model; no store is needed.
        texts: held-out texts.
        options: what to find.
        command: command line to record.
        folder: keeps the results of each sequence, so that a run that was killed goes on at the next one; None to keep
            nothing.
        progress: show a progress bar on stderr.
        show: called with what each stage has measured, which is lost if the promise is not kept.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: the options do not fit each other or the model, there is too little text, or `folder` holds
            another run.
        PromiseNotKept: no floor keeps the promise, or too few tokens were measured to tell.
    """
    _check(options)
    texts = different_texts(texts)
    num_tokens = [len(tokenise(subject.tokenizer, text.content)) for text in texts]
    num_confirmations = _num_confirmations(subject, options, sum(num_tokens))
    floors = options.floors

    def measure(
        stage: str, rungs: Sequence[int], num_sequences: int, *, skip: int, equal_rows: tuple[float, ...] = ()
    ) -> tuple[DecodeReport, dict[int, list[MeasuredLength]]]:
        with naming_the_flag():
            report = evaluate_decode(
                subject,
                texts,
                [floor_variant(floors[rung], heavy=options.heavy) for rung in rungs],
                DecodeOptions(
                    lengths=options.lengths,
                    num_sequences=num_sequences,
                    window=options.window,
                    equal_rows=equal_rows,
                    seed=options.seed,
                    skip=skip,
                ),
                folder=None if folder is None else folder / stage.replace(" ", "-"),
                progress=progress,
                title=stage,
            )
        if show is not None:
            show(report)
        return report, {
            rung: [measured_length(one, one.comparisons[index], confidence=CONFIDENCE) for one in report.lengths]
            for index, rung in enumerate(rungs)
        }

    ladder, on_ladder = measure(
        "choosing", range(len(floors)), options.num_to_choose, skip=0, equal_rows=options.equal_rows
    )
    confirmations: list[DecodeReport] = []

    expected = expect([on_ladder[rung] for rung in range(len(floors))], options.num_sequences, confidence=CONFIDENCE)
    promises: dict[Goal, Promise] = {}
    chosen: dict[Goal, int] = {}
    for goal in options.goals:
        # a floor above one that fails has been lucky
        failing = next((rung for rung, one in enumerate(expected) if not goal.is_kept(one)), len(floors))
        if failing:
            chosen[goal] = failing - 1
        else:
            shortfall = goal.shortfall(floor_label(floors[0], field="floors"), expected[0])
            promises[goal] = _broken(
                goal, f"{options.num_to_choose} sequences let expect of {options.num_sequences} that {shortfall}"
            )
    for confirmation in range(1, num_confirmations + 1):
        if not chosen:
            break
        rungs = sorted(set(chosen.values()))
        report, found = measure(
            f"confirming {confirmation}",
            rungs,
            options.num_sequences,
            skip=options.num_to_choose + (confirmation - 1) * options.num_sequences,
        )
        confirmations.append(report)
        for goal, rung in list(chosen.items()):
            if goal.is_kept(found[rung]):
                promises[goal] = _kept(goal, floors[rung], found[rung])
            else:
                shortfall = f"not confirmed: {goal.shortfall(floor_label(floors[rung], field='floors'), found[rung])}"
                if rung and confirmation < num_confirmations:
                    chosen[goal] = rung - 1
                    continue
                promises[goal] = _broken(goal, f"{shortfall}; there is no lower floor or no further unseen text")
            del chosen[goal]
    ordered = [promises[goal] for goal in options.goals]
    _refuse_broken(ordered)
    setup = subject.setup()
    return Tuned(
        evidence=Evidence(
            mode="values" if options.heavy is None else "shadow",
            heavy=options.heavy,
            weights_sha256=weights_sha256(subject.model_dir),
            dtype=setup.dtype,
            quantization=subject.quantization,
            device=setup.device,
            window=options.window,
            confidence=CONFIDENCE,
            seed=options.seed,
            text=tuple(
                MeasuredText(**text.source.model_dump(), num_tokens=count)
                for text, count in zip(texts, num_tokens, strict=True)
            ),
            versions=setup.versions,
            command=command,
            date=datetime.datetime.now(datetime.UTC).date(),
            promises=tuple(ordered),
        ),
        ladder=ladder,
        confirmations=tuple(confirmations),
    )


def _check(options: TuneOptions) -> None:
    if not options.goals or any(goal.max_loss is None and goal.max_kl is None for goal in options.goals):
        raise EvaluationError("nothing is promised", field="max_loss", remedy="Give --max-loss, --max-kl or --presets")
    for goal in options.goals:
        for field in ("max_loss", "max_kl"):
            limit = getattr(goal, field)
            if limit is not None and not 0 < limit <= 100:
                raise EvaluationError(f"expected more than 0 and at most 100, got {limit:g}", field=field)
    if options.num_sequences < MIN_SEQUENCES:
        raise EvaluationError(
            f"the spread between {options.num_sequences} sequences says too little of the error",
            field="sequences",
            remedy=f"Ask for {MIN_SEQUENCES} at least",
        )
    if not options.floors or list(options.floors) != sorted(set(options.floors)) or options.floors[0] <= 0:
        raise EvaluationError("floors have to ascend from above 0", field="floors", remedy="Write them as 0.5,1,2")
    if options.equal_rows and options.heavy is not None:
        raise EvaluationError(
            "what copies read is not compared with exact top-k", field="equal_rows", remedy="Leave --equal-rows out"
        )


def _num_confirmations(subject: DecodedSubject, options: TuneOptions, num_tokens: int) -> int:
    """How often a floor can be confirmed on unseen sequences of every length.

    Raises:
        EvaluationError: not once.
    """
    check_options(subject, DecodeOptions(options.lengths, options.num_sequences, options.window))
    longest = max(options.lengths) - len(prompt_prefix(subject.tokenizer))
    needed = (options.num_to_choose + options.num_sequences) * longest
    if num_tokens < needed:
        raise EvaluationError(
            f"the texts have {num_tokens} tokens, and to choose a floor on {options.num_to_choose} sequences of "
            f"{max(options.lengths)} and confirm it on {options.num_sequences} others takes {needed}; nothing was "
            "measured",
            field="text",
            remedy="Give more text (--text), or ask for fewer (--sequences) or shorter ones (--lengths)",
        )
    return min(MAX_CONFIRMATIONS, (num_tokens // longest - options.num_to_choose) // options.num_sequences)


def _kept(goal: Goal, floor: float, measured: Sequence[MeasuredLength]) -> Promise:
    return Promise.model_validate({**vars(goal), "weight_floor": floor, "measured": tuple(measured)})


def _broken(goal: Goal, reason: str) -> Promise:
    return Promise.model_validate({**vars(goal), "reason": reason, "measured": ()})


def _refuse_broken(promises: Sequence[Promise]) -> None:
    """Refuses promises of which nothing can be served: a user's own one that is not kept, or presets none of which is.

    Raises:
        PromiseNotKept: says why.
    """
    own = [promise for promise in promises if promise.preset is None]
    if any(promise.weight_floor is not None for promise in own or promises):
        return
    broken = own or promises
    raise PromiseNotKept(
        "; ".join(f"{promise.text}: {promise.reason}" for promise in broken),
        field="max_loss" if broken[0].max_loss is not None else "max_kl",
        remedy="No store was written. Measure more (--sequences, --window, more --text), promise less "
        "(--max-loss, --max-kl), or try lower floors (--floors)",
    )
