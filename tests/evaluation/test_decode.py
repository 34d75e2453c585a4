import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.calibration.tiny_model import NUM_LAYERS
from vllm_toptheta.calibration.data import Text, read_text
from vllm_toptheta.errors import CalibrationError, EvaluationError
from vllm_toptheta.evaluation import (
    DecodeOptions,
    DecodeReport,
    Subject,
    Variant,
    decode_table,
    evaluate_decode,
    expand_variants,
    measuring,
)
from vllm_toptheta.evaluation.decode_report import share_of_bytes
from vllm_toptheta.store import ThresholdStore

RESULTS = Path(__file__).parents[2] / "docs" / "results"
OPTIONS = DecodeOptions(lengths=(200, 260), num_sequences=2, window=32, equal_rows=(3.0,))
VARIANTS = expand_variants({}, targets=["floor:0", "floor:1", "floor:3"])


@pytest.fixture(scope="module")
def subject(folder: Path, store: ThresholdStore) -> Subject:
    return Subject(folder / "tiny", {"": store}, device="cpu")


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[Text]:
    return [read_text(folder / "prose.txt")]


@pytest.fixture(scope="module")
def report(subject: Subject, texts: list[Text]) -> DecodeReport:
    return evaluate_decode(subject, texts, VARIANTS, OPTIONS, progress=False)


def test_a_larger_floor_reads_less_and_none_is_dense(report: DecodeReport) -> None:
    assert [one.length for one in report.lengths] == [200, 260]
    for one in report.lengths:
        assert (one.num_sequences, one.num_predicted_tokens) == (2, 2 * 31)
        nothing, small, large, top_k = one.comparisons
        assert nothing.kl_divergence == pytest.approx(0, abs=1e-6)
        assert nothing.change_percent == pytest.approx(0, abs=1e-3)
        assert (nothing.value_rows_share, nothing.top1_agreement, nothing.lost_mass.p99) == (1, 1, 0)
        assert nothing.acceptance == pytest.approx(1, abs=1e-4)
        assert nothing.survivors.max == one.length
        assert 1 > small.value_rows_share > large.value_rows_share > 0
        assert 0 < small.kl_divergence < large.kl_divergence
        assert 1 > small.acceptance > large.acceptance > 0
        assert small.lost_mass.mean < large.lost_mass.mean <= large.lost_mass.p99
        assert large.survivors.p50 <= large.survivors.p99 <= large.survivors.max < one.length
        assert top_k.equal_rows == "floor:3"
        assert top_k.variant.method == "top_k"
        assert top_k.survivors.p99 == top_k.survivors.p50 == int(top_k.variant.target.removeprefix("k:"))
        assert [layer.layer for layer in large.layers] == list(range(NUM_LAYERS))
        shares = [layer.value_rows_share for layer in large.layers]
        assert large.value_rows_share == pytest.approx(np.mean(shares), abs=1e-4)
        assert (nothing.keys_read_share, large.keys_read_share, nothing.bytes_share) == (1, 1, 1)
        assert large.copies_read_share is None
        assert large.bytes_share == pytest.approx((1 + large.value_rows_share) / 2, abs=1e-4)


def test_calibrated_thresholds_and_their_dense_layers(subject: Subject, texts: list[Text]) -> None:
    options = DecodeOptions(lengths=(200,), num_sequences=1, window=32)
    found = evaluate_decode(subject, texts, [Variant(target="k:32")], options, progress=False)
    (comparison,) = found.lengths[0].comparisons
    dense, *sparse = comparison.layers
    assert (dense.value_rows_share, dense.survivors, dense.lost_mass) == (1, None, None)
    assert all(layer.value_rows_share < 1 and layer.survivors is not None for layer in sparse)
    assert (comparison.change_standard_error, comparison.kl_standard_error) == (None, None)
    assert found.setup.stores[0].model_id == "org/tiny-model"


def test_tiers_read_some_keys_exactly_and_some_values_as_copies(subject: Subject, texts: list[Text]) -> None:
    options = DecodeOptions(lengths=(260,), num_sequences=2, window=32)
    variants = [Variant(method="tiers", target="floor:1", heavy=heavy, dense_layers=(2,)) for heavy in (0.0, 0.01, 0.1)]
    found = evaluate_decode(subject, texts, variants, options, progress=False)
    everything, some, few = found.lengths[0].comparisons
    assert (everything.keys_read_share, everything.copies_read_share) == (1, 0)
    assert 1 > some.keys_read_share > few.keys_read_share > 0.25
    assert 0 < some.copies_read_share < few.copies_read_share < 0.75
    assert everything.value_rows_share > some.value_rows_share > few.value_rows_share
    assert everything.kl_divergence < few.kl_divergence
    # heads of 16: a copy of a key has 10 bytes, of a value 6, and the dense layer has none
    for one in found.lengths[0].comparisons:
        exact = 32 * (one.keys_read_share + one.value_rows_share)
        read = exact + 10 * 0.75 + 6 * one.copies_read_share
        assert one.bytes_share == pytest.approx(read / 64, abs=1e-4)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"keys": 1.0, "value_rows": 1.0}, 1.0),
        ({"keys": 1.0, "value_rows": 0.25}, 0.625),
        # 64 channels: 34 of 256 bytes for a key's copy, 18 for a value's
        ({"keys": 0.0, "value_rows": 0.0, "key_copies": 1.0}, 34 / 256),
        ({"keys": 0.0, "value_rows": 0.0, "value_copies": 1.0}, 18 / 256),
        ({"keys": 0.1, "value_rows": 0.05, "key_copies": 1.0, "value_copies": 0.5}, (19.2 + 34 + 9) / 256),
    ],
)
def test_bytes_of_a_16_bit_cache(shares: dict[str, float], expected: float) -> None:
    assert share_of_bytes(head_size=64, **shares) == pytest.approx(expected)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*-decode-*.json")), ids=lambda file: file.stem)
def test_reports_from_before_bytes_were_counted_can_be_read(file: Path) -> None:
    older = DecodeReport.model_validate_json(file.read_bytes())
    assert len(decode_table(older).rows) == sum(len(one.comparisons) for one in older.lengths)


def test_one_that_was_killed_goes_on_at_the_next_sequence(
    subject: Subject, texts: list[Text], report: DecodeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_prefix, calls = measuring.read_prefix, list[int]()

    def dies_in_the_second_sequence(model: Any, token_ids: Any, cache: Any, **options: Any) -> Any:
        calls.append(len(token_ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read_prefix(model, token_ids, cache, **options)

    monkeypatch.setattr(measuring, "read_prefix", dies_in_the_second_sequence)
    arguments = (subject, texts, VARIANTS, OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        evaluate_decode(*arguments, folder=tmp_path, progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {
        "arguments.json",
        "200-0.safetensors",
        "260-0.safetensors",
    }
    found = evaluate_decode(*arguments, folder=tmp_path, progress=False)
    assert calls == [168, 60, 168, 60, 168, 60]
    assert found == report
    assert DecodeReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    # a third time there is nothing to do
    assert evaluate_decode(*arguments, folder=tmp_path, progress=False) == report
    assert len(calls) == 6

    other = DecodeOptions(lengths=(200, 260), num_sequences=2, window=31, equal_rows=(3.0,))
    with pytest.raises(EvaluationError, match=r"output: the folder holds an evaluation with other variants, window\."):
        evaluate_decode(subject, texts, VARIANTS[1:], other, folder=tmp_path, progress=False)
    (tmp_path / "200-1.safetensors").write_bytes((tmp_path / "200-1.safetensors").read_bytes()[:1000])
    with pytest.raises(EvaluationError, match=r"200-1.safetensors: damaged: .* Delete it, and it is measured again"):
        evaluate_decode(*arguments, folder=tmp_path, progress=False)


def test_a_folder_of_something_else_is_left_alone(subject: Subject, texts: list[Text], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(EvaluationError, match="output: the folder holds something else"):
        evaluate_decode(subject, texts, VARIANTS, OPTIONS, folder=tmp_path, progress=False)
    with pytest.raises(EvaluationError, match="output: cannot be used: .* Name a new folder"):
        evaluate_decode(subject, texts, VARIANTS, OPTIONS, folder=tmp_path / "thesis.txt", progress=False)
    (tmp_path / "arguments.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"arguments.json: output: not the arguments of an evaluation"):
        evaluate_decode(subject, texts, VARIANTS, OPTIONS, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (200, 2000)}, "lengths: 2000 tokens are more than the 1024 positions of the model"),
        ({"lengths": (32,)}, "lengths: no prompt is left of 32 tokens with a window of 32"),
        ({"lengths": ()}, "lengths: lengths have to differ"),
        ({"lengths": (200, 200)}, "lengths: lengths have to differ"),
        ({"lengths": (160,)}, "lengths: top-theta floor:0 sdc.vmc keeps every key of rows of up to 144"),
        ({"window": 1}, "window: a window has at least 2 tokens, got 1"),
        ({"num_sequences": 0}, "sequences: no number of sequences: 0"),
        ({"equal_rows": (-1.0,)}, "equal_rows: no weight floor: -1"),
    ],
)
def test_options_that_do_not_fit(subject: Subject, texts: list[Text], options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate_decode(
            subject, texts, VARIANTS, DecodeOptions(**{"lengths": (200,), "window": 32, **options}), progress=False
        )


def test_nothing_to_compare_and_too_little_text(subject: Subject, texts: list[Text]) -> None:
    with pytest.raises(EvaluationError, match="weight_floor: nothing to compare"):
        evaluate_decode(subject, texts, [], DecodeOptions(lengths=(200,), window=32), progress=False)
    options = DecodeOptions(lengths=(200,), num_sequences=99, window=32)
    with pytest.raises(CalibrationError, match="but 99 sequences of 200 need 19800. Give more text"):
        evaluate_decode(subject, texts, VARIANTS, options, progress=False)


def test_the_table_has_every_length_and_variant(report: DecodeReport) -> None:
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(decode_table(report))
    printed = console.export_text()
    for length in (200, 260):
        for name in ("floor:0", "floor:1", "floor:3", "(rows of floor:3)"):
            assert any(str(length) in line and name in line for line in printed.splitlines())
