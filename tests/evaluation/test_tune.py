"""Promises: which floor is chosen and confirmed, what is refused, and that a run that was killed goes on."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.tiny_model import write_text
from tests.quality_factory import make_length
from vllm_toptheta.calibration.data import Text, read_text
from vllm_toptheta.errors import EvaluationError, PromiseNotKept
from vllm_toptheta.evaluation import (
    DecodeOptions,
    DecodeReport,
    Goal,
    Subject,
    TuneOptions,
    Variant,
    measuring,
    tune,
    tune_floors,
)
from vllm_toptheta.evaluation.decode_report import DecodeComparison, LengthReport
from vllm_toptheta.evaluation.paired import mean_and_error, upper_bound
from vllm_toptheta.store import Evidence, weights_sha256

FLOORS = (0.05, 0.3, 1.0, 3.0)
LENGTHS = (200, 260)
SMALL = {"lengths": LENGTHS, "num_sequences": 4, "window": 32, "floors": FLOORS}


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject(folder / "tiny", {}, device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    return [read_text(write_text(tmp_path_factory.mktemp("texts") / "long.txt", 1500, seed=5))]


def found(subject: Subject, texts: list[Text], *goals: Goal, folder: Path | None = None, **options: Any) -> Evidence:
    chosen = TuneOptions(goals, **{**SMALL, **options})
    return tune_floors(subject, texts, chosen, command="toptheta tune tiny", folder=folder, progress=False).evidence


def test_a_larger_loss_allows_a_larger_floor(subject: Subject, texts: list[Text]) -> None:
    goals = [Goal(max_kl=limit) for limit in (0.001, 0.01, 0.1)]
    evidence = found(subject, texts, *goals[:1], *(Goal(goal.max_loss, goal.max_kl, "fast") for goal in goals[2:]))
    strict, loose = evidence.promises
    assert strict.weight_floor is not None
    assert loose.weight_floor is not None
    assert strict.weight_floor < loose.weight_floor
    for promise in (strict, loose):
        assert [one.length for one in promise.measured] == list(LENGTHS)
        for one in promise.measured:
            assert (one.num_sequences, one.num_tokens) == (4, 4 * 31)
            assert one.kl_divergence < one.kl_bound < (promise.max_kl or 0)
            assert one.kl_bound == upper_bound(one.kl_divergence, one.kl_error, 4, confidence=0.95)
            assert one.change_bound == upper_bound(one.change_percent, one.change_error, 4, confidence=0.95)
    assert strict.worst.value_rows_share > loose.worst.value_rows_share
    for little, much in zip(strict.measured, loose.measured, strict=True):
        assert little.lost_mass_p99 is not None
        assert much.lost_mass_p99 is not None
        assert len(little.lost_mass_p99) == len(much.lost_mass_p99) == subject.model.config.num_hidden_layers
        pairs = zip(little.lost_mass_p99, much.lost_mass_p99, strict=True)
        assert all(0 < (one or 0) < (other or 0) for one, other in pairs)
    assert len(evidence.lost_mass_p99) == subject.model.config.num_hidden_layers
    assert (evidence.mode, evidence.heavy, evidence.dtype, evidence.device) == ("values", None, "float32", "cpu")
    assert (evidence.window, evidence.quantization, evidence.command) == (32, "none", "toptheta tune tiny")
    assert evidence.weights_sha256 == weights_sha256(subject.model_dir)
    (text,) = evidence.text
    assert (text.name, text.sha256, text.num_tokens) == ("long.txt", texts[0].source.sha256, len(texts[0].content))


def test_mode_shadow_measures_copies(subject: Subject, texts: list[Text]) -> None:
    evidence = found(subject, texts, Goal(max_kl=0.05), heavy=0.01)
    assert (evidence.mode, evidence.heavy) == ("shadow", 0.01)
    values = found(subject, texts, Goal(max_kl=0.05))
    assert evidence.served.measured != values.served.measured


def test_a_promise_is_confirmed_on_sequences_that_the_choice_did_not_see(
    subject: Subject, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    read_window = measuring.read_window

    def remember(model: Any, cache: Any, token_ids: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(tuple(token_ids.tolist()))
        return read_window(model, cache, token_ids, *arguments, **options)

    monkeypatch.setattr(measuring, "read_window", remember)
    found(subject, texts, Goal(max_kl=1.0), lengths=(200,))
    # dense and every floor on the ladder, dense and one floor to confirm
    chosen, confirmed = seen[: 4 * 5], seen[4 * 5 :]
    assert len(confirmed) == 4 * 2
    assert (len(set(chosen)), len(set(confirmed))) == (4, 4)
    assert not set(chosen) & set(confirmed)


def test_one_that_was_killed_goes_on(
    subject: Subject, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = found(subject, texts, Goal(max_kl=0.01))
    read_prefix, calls = measuring.read_prefix, list[int]()

    def dies(model: Any, token_ids: Any, cache: Any, **options: Any) -> Any:
        calls.append(len(token_ids))
        if len(calls) in (6, 12):
            raise KeyboardInterrupt
        return read_prefix(model, token_ids, cache, **options)

    monkeypatch.setattr(measuring, "read_prefix", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            found(subject, texts, Goal(max_kl=0.01), folder=tmp_path)
    assert found(subject, texts, Goal(max_kl=0.01), folder=tmp_path) == whole
    # 2 lengths of 4 sequences to choose on and as many to confirm on, two of which were read twice
    assert len(calls) == 16 + 4
    assert {one.name for one in tmp_path.iterdir()} == {"choosing", "confirming-1"}
    with pytest.raises(EvaluationError, match=r"other window\. Repeat the command .* or start anew with --no-resume"):
        found(subject, texts, Goal(max_kl=0.01), folder=tmp_path, window=31)


@pytest.mark.parametrize(
    ("goal", "options", "message"),
    [
        (Goal(), {}, "max_loss: nothing is promised"),
        (Goal(max_loss=0.0), {}, "max_loss: expected more than 0 and at most 100, got 0"),
        (Goal(max_kl=math.nan), {}, "max_kl: expected more than 0"),
        (Goal(0.5), {"num_sequences": 3}, "sequences: the spread between 3 sequences .* Ask for 4"),
        (Goal(0.5), {"floors": (1.0, 0.5)}, "floors: floors have to ascend"),
        (Goal(0.5), {"floors": (0.0, 0.5)}, "floors: floors have to ascend from above 0"),
        (Goal(0.5), {"floors": (1.0, 2000.0)}, "floors: no weight floor: 2000"),
        (Goal(0.5), {"lengths": (200, 2000)}, "2000 tokens are more than the 1024 positions"),
        (Goal(0.5), {"num_sequences": 90}, r"text: the texts have \d+ tokens, .* takes 35100; nothing was measured"),
        (
            Goal(1e-6),
            {},
            r"max_loss: perplexity within 1e-06 %: 4 sequences let expect of 4 that with floor:0.05 .* No store was",
        ),
        (Goal(max_kl=1e-9), {}, r"max_kl: KL to dense .*, up to .* with 95% confidence \(4 sequences, 124 tokens\)"),
    ],
)
def test_refusals(subject: Subject, texts: list[Text], goal: Goal, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        found(subject, texts, goal, **options)


def test_what_was_measured_and_not_kept_is_an_error_of_its_own(subject: Subject, texts: list[Text]) -> None:
    with pytest.raises(PromiseNotKept):
        found(subject, texts, Goal(1e-6))
    with pytest.raises(EvaluationError) as caught:
        found(subject, texts, Goal(0.5), num_sequences=90)
    assert not isinstance(caught.value, PromiseNotKept)


Losses = Callable[[float, int], tuple[float, float]]


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Losses], list[tuple[int, list[str]]]]:
    """Has floors lose what a function says, change and error in percent by floor and stage (0 is the choice).

    Returns the stages and targets that were measured.
    """

    def install(losses: Losses) -> list[tuple[int, list[str]]]:
        calls: list[tuple[int, list[str]]] = []

        def evaluate(
            subject: Subject, texts: object, variants: Sequence[Variant], options: DecodeOptions, **other: object
        ) -> DecodeReport:
            stage = -(-options.skip // options.num_sequences)
            calls.append((stage, [variant.target for variant in variants]))
            comparisons = []
            for variant in variants:
                change, error = losses(variant.weight_floor or 0, stage)
                names = DecodeComparison.model_fields
                kl_divergence = 0.001 + max(change, 0) / 100
                figures = make_length(
                    change_percent=change, change_error=error, kl_divergence=kl_divergence
                ).model_dump()
                comparisons.append(
                    DecodeComparison.model_construct(
                        **{name: value for name, value in figures.items() if name in names},
                        variant=variant,
                        change_standard_error=error,
                        kl_standard_error=figures["kl_error"],
                        layers=(),
                    )
                )
            lengths = [
                LengthReport.model_construct(
                    length=length,
                    num_sequences=options.num_sequences,
                    num_predicted_tokens=124,
                    perplexity_dense=10.0,
                    comparisons=tuple(comparisons),
                )
                for length in options.lengths
            ]
            return DecodeReport.model_construct(lengths=tuple(lengths))

        monkeypatch.setattr(tune, "evaluate_decode", evaluate)
        return calls

    return install


def test_one_that_is_not_confirmed_gives_way_to_the_next_lower(
    subject: Subject, texts: list[Text], losing: Any
) -> None:
    calls = losing(lambda floor, stage: (0.9 if stage and floor > 0.3 else 0.1 * floor, 0.01))
    evidence = found(subject, texts, Goal(0.5), lengths=(200,))
    assert calls[1:] == [(1, ["floor:3"]), (2, ["floor:1"]), (3, ["floor:0.3"])]
    assert evidence.served.weight_floor == 0.3


def test_one_that_is_never_confirmed_is_refused(subject: Subject, texts: list[Text], losing: Any) -> None:
    calls = losing(lambda floor, stage: (0.9 if stage else 0.1, 0.01))
    with pytest.raises(EvaluationError, match=r"not confirmed: with floor:0.3 .* changes by \+0.900 .* unseen text\."):
        found(subject, texts, Goal(0.5), lengths=(200,))
    assert [stage for stage, _ in calls] == [0, 1, 2, 3]


def test_without_further_text_there_is_no_second_confirmation(subject: Subject, texts: list[Text], losing: Any) -> None:
    calls = losing(lambda floor, stage: (0.9 if stage else 0.1, 0.01))
    two_thirds = 2 * (len(texts[0].content) // 260) // 3
    with pytest.raises(EvaluationError, match="no lower floor or no further unseen text"):
        found(subject, texts, Goal(0.5), num_sequences=two_thirds)
    assert [stage for stage, _ in calls] == [0, 1]


def test_a_floor_above_one_that_fails_has_been_lucky(subject: Subject, texts: list[Text], losing: Any) -> None:
    losing(lambda floor, stage: ({0.3: 0.6}.get(floor, 0.1), 0.01))
    assert found(subject, texts, Goal(0.5)).served.weight_floor == 0.05


def test_few_sequences_choose_what_more_of_them_can_confirm(subject: Subject, texts: list[Text], losing: Any) -> None:
    # of 6 sequences and t of 5 degrees of freedom the bound is 0.60; of 12 that spread alike it is 0.38
    losing(lambda floor, stage: (0.1, 0.2 if stage else 0.3))
    evidence = found(subject, texts, Goal(0.5), num_sequences=12)
    assert evidence.served.weight_floor == 3.0
    assert [one.num_sequences for one in evidence.served.measured] == [12, 12]
    with pytest.raises(PromiseNotKept, match=r"6 .* of 12 .* up to \+0.381 % with 95% confidence \(12 sequences, 248"):
        found(subject, texts, Goal(0.37), num_sequences=12)


def test_too_wide_an_error_decides_nothing(subject: Subject, texts: list[Text], losing: Any) -> None:
    losing(lambda floor, stage: (0.1, 1.0))
    # t of 3 degrees of freedom is 2.353, so 2.353 / 0.5 = 4.7 times fewer errors take 22 times the sequences
    with pytest.raises(EvaluationError, match=r"by up to .2.347 % with .* about 89 sequences could decide"):
        found(subject, texts, Goal(0.5))
    losing(lambda floor, stage: (0.6, 0.01))
    with pytest.raises(EvaluationError, match=r"changes by \+0.577 .*the mean is above the promise"):
        found(subject, texts, Goal(0.5))


def test_presets_that_cannot_be_kept_are_recorded_with_the_reason(
    subject: Subject, texts: list[Text], losing: Any
) -> None:
    losing(lambda floor, stage: (0.3 * floor, 0.04))
    goals = [Goal(0.2, preset="high"), Goal(0.05, preset="exact"), Goal(1.0, preset="fast")]
    evidence = found(subject, texts, *goals)
    assert evidence.preset_floors == {"high": 0.3, "fast": 3.0}
    exact = evidence.promises[1]
    assert (exact.preset, exact.weight_floor, exact.measured) == ("exact", None, ())
    assert "with floor:0.05 at 200 tokens" in (exact.reason or "")
    # a user's own promise that is not kept is an error, whatever presets are
    with pytest.raises(EvaluationError, match="perplexity within 0.01 %: "):
        found(subject, texts, Goal(0.01), *goals)


@pytest.mark.parametrize(("num_sequences", "t"), [(4, 2.3534), (8, 1.8946), (31, 1.6973), (10**6, 1.6449)])
def test_the_bound_is_that_of_students_t(num_sequences: int, t: float) -> None:
    assert upper_bound(0.5, 2.0, num_sequences, confidence=0.95) == pytest.approx(0.5 + 2 * t, rel=3e-3)


def test_the_bound_holds_as_often_as_it_should() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        mean, error = mean_and_error((1 + generator.normal(size=5)).tolist(), [1.0] * 5)
        assert error is not None
        held += upper_bound(mean, error, 5, confidence=0.95) > 1
    assert 0.94 < held / 2000 < 0.96
