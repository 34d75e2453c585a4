"""Measured quality: what evidence may say, where a server differs from it, and its way through a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.quality_factory import make_evidence, make_length, make_probe, make_promise
from tests.store_factory import make_draft, make_store
from vllm_toptheta.errors import FingerprintMismatch
from vllm_toptheta.store import (
    Architecture,
    Evidence,
    Manifest,
    ModelIdentity,
    Promise,
    Serving,
    TaskProbe,
    load,
    local_folder,
    record_quality,
    weights_sha256,
)

MODEL = ModelIdentity(id="acme/tiny")
ARCHITECTURE = make_draft().architecture


def record(folder: Path, evidence: Evidence, architecture: Architecture = ARCHITECTURE) -> Evidence | None:
    record_quality(folder, evidence, model=MODEL, architecture=architecture)
    return load(folder).manifest.evidence(evidence.mode)


def test_a_model_without_a_store_gets_one(tmp_path: Path) -> None:
    evidence = make_evidence(
        make_promise(lengths=(2048, 8192), max_loss=0.5, max_kl=0.001),
        make_promise(None, preset="exact", max_loss=0.05),
        weights_sha256="a" * 64,
    )
    assert record(tmp_path / "acme--tiny", evidence) == evidence
    found = load(tmp_path / "acme--tiny")
    assert (found.manifest.model, found.manifest.architecture) == (MODEL, ARCHITECTURE)
    assert (found.calibrated, found.shadow_keys, found.manifest.calibration) == (None, None, None)
    assert found.manifest.calibrated_on == frozenset()
    assert found.manifest.evidence("shadow") is None


def test_the_largest_lost_mass_of_all_lengths_counts(tmp_path: Path) -> None:
    assert make_evidence().lost_mass_p99 == {}
    measured = (
        make_length(2048, lost_mass_p99=(None, 0.3, 0.05)),
        make_length(4096),
        make_length(8192, lost_mass_p99=(None, 0.2, 0.1, None, None, 1e-6)),
    )
    evidence = make_evidence(make_promise().model_copy(update={"measured": measured}))
    assert record(tmp_path / "acme--tiny", evidence) == evidence
    assert evidence.lost_mass_p99 == {1: 0.3, 2: 0.1, 5: 1e-6}


def test_what_was_not_measured_is_written_as_before(tmp_path: Path) -> None:
    record(tmp_path / "acme--tiny", make_evidence())
    text = (tmp_path / "acme--tiny" / "manifest.yaml").read_text()
    assert "lost_mass" not in text
    assert "probes" not in text


def test_tasks_that_were_tried_are_kept(tmp_path: Path) -> None:
    probes = (make_probe(), make_probe("key-value"), make_probe("needle", 8192, dense=2, lost=2))
    evidence = make_evidence(make_promise(lengths=(2048, 8192), probes=probes))
    assert record(tmp_path / "acme--tiny", evidence) == evidence
    # a served promise is what it was
    assert evidence.line == make_evidence(make_promise(lengths=(2048, 8192))).line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "human-eval"}, "'needle' or 'key-value'"),
        ({"num_questions": 0}, "greater than or equal to 1"),
        ({"num_lost": 2}, "not what the numbers solved differ by"),
        ({"num_gained": -1, "num_lost": 0}, "greater than or equal to 0"),
        ({"num_solved_sparse": 20, "num_gained": 2}, "more questions than there are"),
        ({"num_solved_dense": 0, "num_solved_sparse": 0, "num_gained": 1}, "more questions than there are"),
        ({"difference_low": 0.2}, "ends before it begins"),
        ({"difference_high": 1.5}, "less than or equal to 1"),
        ({"num_questions": 20.0}, "valid integer"),
        ({"p_value": 1.0}, "Extra inputs"),
    ],
)
def test_what_cannot_be_solved(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskProbe.model_validate({**make_probe().model_dump(), **change})


def test_a_store_keeps_all_else_and_the_evidence_of_other_modes(tmp_path: Path) -> None:
    before = make_store(tmp_path / "acme--tiny", measured=True, num_channels=4)
    shadow = make_evidence(mode="shadow", heavy=0.007)
    for evidence in (make_evidence(), shadow, make_evidence(make_promise(2.0))):
        assert record(before.folder, evidence) == evidence
    after = load(before.folder)
    assert after.manifest.evidence("shadow") == shadow
    assert after.manifest.model_dump(exclude={"quality", "content_sha256"}) == before.manifest.model_dump(
        exclude={"quality", "content_sha256"}
    )
    assert before.calibrated is not None
    assert after.calibrated is not None
    np.testing.assert_array_equal(after.calibrated.coefficients, before.calibrated.coefficients)
    np.testing.assert_array_equal(after.shadow.encoder, before.shadow.encoder)


def test_evidence_of_another_architecture_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "acme--tiny")
    with pytest.raises(FingerprintMismatch, match="num_layers"):
        record(tmp_path / "acme--tiny", make_evidence(), ARCHITECTURE.model_copy(update={"num_layers": 5}))


def test_stores_of_version_4_still_load(tmp_path: Path) -> None:
    store = make_store(tmp_path / "acme--tiny")
    older = store.manifest.model_copy(update={"schema_version": 4})
    older = older.model_copy(update={"content_sha256": older.digest()})
    file = store.folder / "manifest.yaml"
    text = file.read_text().replace("schema_version: 5", "schema_version: 4")
    file.write_text(text.replace(store.manifest.content_sha256, older.content_sha256))
    assert load(store.folder).manifest == older
    assert record(store.folder, make_evidence()) == make_evidence()
    assert load(store.folder).manifest.schema_version == 5
    fields = older.model_dump() | {"quality": (make_evidence().model_dump(),)}
    with pytest.raises(ValidationError, match="there is none in version 4"):
        Manifest.model_validate(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "shadow"}, "heavy is of mode shadow"),
        ({"heavy": 0.1}, "heavy is of mode shadow"),
        ({"promises": (make_promise(), make_promise(2.0))}, "made twice"),
        ({"promises": (make_promise(None),)}, "none is kept"),
        ({"window": 2048}, "no prompt is left"),
        ({"promises": ()}, "at least 1 item"),
        ({"text": ()}, "at least 1 item"),
    ],
)
def test_what_evidence_cannot_say(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_evidence(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_loss": None}, "says how much may be lost"),
        ({"max_loss": 0.0}, "greater than 0"),
        ({"weight_floor": None}, "a floor and figures, or a reason"),
        ({"reason": "because"}, "a floor and figures, or a reason"),
        ({"measured": ()}, "a floor and figures, or a reason"),
        ({"weight_floor": 1001.0}, "less than or equal to 1000"),
        ({"preset": "best"}, "'exact', 'high' or 'fast'"),
        ({"probes": ()}, "at least 1 item"),
        ({"probes": (make_probe(), make_probe())}, "tried twice at one length"),
        (
            {"weight_floor": None, "measured": (), "reason": "because", "probes": (make_probe(),)},
            "no floor to try",
        ),
    ],
)
def test_what_a_promise_cannot_say(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Promise.model_validate({**make_promise().model_dump(), **change})


def test_two_sections_of_one_mode_and_calibration_of_nothing_are_refused() -> None:
    fields = make_draft().model_dump()
    with pytest.raises(ValidationError, match="measured twice in mode values"):
        type(make_draft()).model_validate(fields | {"quality": (make_evidence(), make_evidence())})
    with pytest.raises(ValidationError, match="calibration belongs to"):
        type(make_draft()).model_validate(fields | {"thresholds": None, "quality": (make_evidence(),)})


def test_the_first_promise_that_is_kept_is_served() -> None:
    evidence = make_evidence(
        make_promise(None, preset="high", max_loss=0.2),
        make_promise(0.5, preset="exact", max_loss=0.05, lengths=(2048, 8192)),
        make_promise(3.0, preset="fast", max_loss=1.0),
    )
    assert evidence.served.preset == "exact"
    assert evidence.preset_floors == {"exact": 0.5, "fast": 3.0}
    # the rows measured saw 1,793 to 8,192 keys
    assert (evidence.dense_length, evidence.served.max_length) == (2048 - 256, 8192)


def test_the_line_says_the_worst_that_was_measured() -> None:
    worst = make_length(4096, change_percent=0.4, change_error=0.05, kl_divergence=0.002)
    promise = make_promise(max_loss=0.5).model_copy(update={"measured": (make_length(), worst, make_length(8192))})
    assert make_evidence(promise).line == (
        "promised: perplexity within 0.5 % up to 8192 tokens, measured +0.40 +- 0.05 % at 4096 tokens on prose.txt"
    )
    both = promise.model_copy(update={"max_kl": 0.003})
    assert "perplexity within 0.5 % and KL to dense attention within 0.003 up to" in make_evidence(both).line
    further = make_length(8192, kl_divergence=0.0025)
    of_kl = both.model_copy(update={"max_loss": None, "measured": (*both.measured[:2], further)})
    assert "promised: KL to dense attention within 0.003 up to 8192 tokens, measured KL 0.00250 +- 0.00010 at 8192" in (
        make_evidence(of_kl).line
    )


SAME = Serving("a" * 64, "bfloat16", "awq_marlin", "auto", 2048, 1792, "sdc+vmc", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"weights_sha256": None, "dtype": None, "quantization": None, "max_length": None, "min_context": None}, None),
        ({"cache_dtype": "bfloat16"}, None),
        ({"max_length": 100, "min_context": 5000}, None),
        ({"weights_sha256": "b" * 64}, "other weights than those measured"),
        ({"dtype": "float16", "cache_dtype": None}, "dtype float16, measured with bfloat16"),
        ({"quantization": "fp8"}, "quantization fp8, measured with awq"),
        ({"quantization": "none"}, "quantization none, measured with awq"),
        ({"cache_dtype": "fp8"}, "a KV cache in fp8, measured with that of the dtype"),
        ({"max_length": 2049}, "up to 2049 tokens, measured up to 2048"),
        ({"min_context": 144}, "sparse from 145 tokens on, measured from 1793 on"),
        ({"compensation": "sdc"}, r"compensation sdc, measured with sdc+vmc"),
        ({"heavy": 0.1}, "heavy 0.1, measured with None"),
    ],
)
def test_where_a_server_differs(change: dict[str, Any], words: str | None) -> None:
    evidence = make_evidence(weights_sha256="a" * 64, dtype="bfloat16", quantization="awq")
    serving = Serving(**{**vars(SAME), **change})
    assert evidence.differences(serving) == ([] if words is None else [words])


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    def fingerprint(content: bytes, name: str = "model.safetensors") -> str | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(str(len(content)))
        (folder / name).write_bytes(content)
        return weights_sha256(folder)

    noise = np.random.default_rng(0).bytes(3 << 20)
    whole = fingerprint(noise)
    assert whole is not None
    assert fingerprint(noise) == whole
    trained = bytes(byte ^ 1 for byte in noise[2 << 20 :])
    others = {
        fingerprint(noise[: 2 << 20] + trained),
        fingerprint(noise[:-1]),
        fingerprint(noise, "other.safetensors"),
        fingerprint(b"short"),
    }
    assert len(others) == 4
    assert whole not in others
    assert fingerprint(noise, "notes.txt") is None
    assert weights_sha256(tmp_path / "nowhere") is None


def test_where_a_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder("acme/tiny", "0" * 40) == snapshot
    assert local_folder("acme/tiny", "1" * 40) is None
    with pytest.raises(ValueError, match="Repo id"):
        local_folder("a/b/c")
