"""From options to thresholds: what is resolved, and what is refused with which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from vllm.config import VllmConfig

from tests import store_factory
from tests.quality_factory import make_evidence, make_length, make_promise
from tests.shadow_store import make_shadow_store
from vllm_toptheta import errors, store
from vllm_toptheta.backend import plan as plan_module
from vllm_toptheta.backend import plugin
from vllm_toptheta.backend.plan import DenseRule, Plan
from vllm_toptheta.backend.rank_report import promised_of
from vllm_toptheta.kernels.contract import DecodeStep
from vllm_toptheta.kernels.cpu.batch import prepare_decode
from vllm_toptheta.kernels.cpu.thresholds import thresholds_at, unread_ratios_at
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR, NUM_ANCHORS
from vllm_toptheta.telemetry.stats import Promised

MakeConfig = Callable[..., VllmConfig]
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_without_a_store_thresholds_are_relative_and_no_layer_is_dense(make_config: MakeConfig) -> None:
    plan = Plan.resolve(make_config())
    assert plan.dense_layers == frozenset()
    assert (plan.model_id, plan.dense_rule, plan.length_range) == (None, (NUM_ANCHORS, 0), (1, 2**31 - 1))
    layer_plan = plan.for_layer(0, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    assert layer_plan.thresholds.is_relative
    expected = torch.tensor([math.log(DEFAULT_WEIGHT_FLOOR), -1.0, 0.0, 1.0]).expand(3, -1)
    assert torch.equal(layer_plan.thresholds.coefficients, expected)


def test_a_floor_of_zero_runs_dense(make_config: MakeConfig) -> None:
    plan = Plan.resolve(make_config({"weight_floor": 0}))
    assert plan.thresholds is None
    assert all(plan.for_layer(layer, num_heads=9, num_kv_heads=3, rank=0) is None for layer in range(4))
    assert (plan.guard, plan.choices.labels) == ("off", ["dense"])


def test_calibrated_thresholds_and_dense_layers_come_from_the_store(
    make_config: MakeConfig, calibrated: Options
) -> None:
    plan = Plan.resolve(make_config(calibrated))
    assert plan.dense_layers == {0}
    assert plan.thresholds is not None
    assert plan.thresholds.label == "k:128"
    assert plan.for_layer(0, num_heads=9, num_kv_heads=3, rank=0) is None
    layer_plan = plan.for_layer(1, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    assert not layer_plan.thresholds.is_relative
    assert torch.equal(layer_plan.thresholds.coefficients, torch.tensor([0.4, 0.1, 0.0, 0.0]).expand(3, -1))


def test_theta_is_evaluated_within_the_calibrated_lengths(
    make_config: MakeConfig, calibrated: Options, thresholds_folder: Path
) -> None:
    plan = Plan.resolve(make_config(calibrated))
    lengths = torch.tensor([5, 129, 1000, 4096, 8000])
    layer_plan = plan.for_layer(2, num_heads=9, num_kv_heads=3, rank=0)
    assert layer_plan is not None
    step = DecodeStep(torch.zeros(5, 500, dtype=torch.int32), lengths.int(), length_range=plan.length_range)
    thetas = thresholds_at(layer_plan.thresholds, prepare_decode(step, 16).prepared, lambda positions: positions, None)
    expected = 0.4 + 0.1 * lengths.clamp(129, 4096).float().log()
    torch.testing.assert_close(thetas, expected[:, None].expand(-1, 9))
    curve = store.load(thresholds_folder).curve_of("k:128")
    torch.testing.assert_close(torch.from_numpy(curve.threshold(lengths.numpy())[:, 2].copy()), thetas)


def test_options_win_over_the_environment(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_WEIGHT_FLOOR", "8")
    monkeypatch.setenv("TOPTHETA_DENSE_LAYERS", "1,2")
    plan = Plan.resolve(make_config())
    assert plan.settings.weight_floor == 8
    assert plan.dense_layers == {1, 2}
    assert plan.thresholds is not None
    assert plan.thresholds.label == "floor:8"
    assert Plan.resolve(make_config({"weight_floor": 1.5})).settings.weight_floor == 1.5


def test_short_sequences_are_dense(make_config: MakeConfig, calibrated: Options) -> None:
    for options, length in (
        ({}, NUM_ANCHORS),
        ({"min_context": 100}, NUM_ANCHORS),
        ({"min_context": 500}, 500),
        (calibrated, 128),
        (calibrated | {"target": "k:64"}, 64),
        (calibrated | {"min_context": 500}, 500),
    ):
        assert Plan.resolve(make_config(options)).dense_rule == (length, 0), options


def test_what_stays_dense_is_the_hardwares_unless_it_is_set(make_config: MakeConfig) -> None:
    automatic = DenseRule(2048, 30_000)
    for options, rule in (
        ({}, automatic),
        ({"min_context": 0}, (NUM_ANCHORS, 0)),
        ({"min_context": 9000}, (9000, 0)),
    ):
        assert replace(Plan.resolve(make_config(options)), automatic=automatic).dense_rule == rule, options


def test_requests_of_a_lossless_server_on_cpus_can_do_without_verification(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"lossless": True})
    assert Plan.resolve(config).choices.labels == ["dense", "floor:2", "floor:0 to 1000", "lossy"]
    assert "lossy" not in Plan.resolve(make_config({})).choices.labels
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    choices = Plan.resolve(config).choices
    assert "lossy" not in choices.labels
    with pytest.raises(
        errors.SettingsError, match="vllm_xargs.toptheta: GPUs verify .* Leave lossy out, or ask a serv"
    ):
        choices.parse("lossy")


def test_shadow_keys(make_config: MakeConfig, shadow_folder: Path) -> None:
    plan = Plan.resolve(make_config({"thresholds": str(shadow_folder), "mode": "shadow"}))
    stored = store.load(shadow_folder).shadow
    assert (plan.code_bytes, plan.guard, plan.dense_layers) == (16, "off", frozenset())
    assert plan.thresholds is not None
    assert plan.thresholds.weight_floor == stored.section.weight_floor
    # what was calibrated at one floor says nothing of another
    assert plan.choices.labels == ["dense", plan.thresholds.label]
    layer_plan = plan.for_layer(2, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    shadow = layer_plan.shadow
    assert shadow is not None
    assert layer_plan.guard is None
    assert shadow.codec.code_bytes == 16
    assert torch.equal(shadow.codec.encoder, torch.tensor(stored.encoder[2, 1:2]))
    assert torch.equal(shadow.margin, torch.tensor(stored.margin[2, 3:6]))
    lengths = torch.tensor([100, 1000, 9000])
    assert plan.length_range == (stored.section.min_length, stored.section.max_length)
    ratios = unread_ratios_at(shadow, lengths.clamp(*plan.length_range).float().log())
    expected = stored.exp_threshold_scale(lengths.numpy())[:, 2, 3:6]
    torch.testing.assert_close(ratios, torch.from_numpy(expected.copy()))
    assert Plan.resolve(make_config()).code_bytes == 0


def test_shadow_keys_hold_at_their_floor(make_config: MakeConfig, shadow_folder: Path) -> None:
    floor = store.load(shadow_folder).shadow.section.weight_floor
    options = {"thresholds": str(shadow_folder), "mode": "shadow"}
    make_config(options | {"weight_floor": floor})
    with pytest.raises(
        errors.SettingsError, match=f"weight_floor: .* at a floor of {floor:g}, not of 7.*--weight-floor 7"
    ):
        make_config(options | {"weight_floor": 7})


@pytest.mark.parametrize(
    ("mode", "scans", "is_said"), [("shadow", False, True), ("shadow", True, False), ("values", False, False)]
)
def test_a_server_of_short_steps_is_told_so(
    make_config: MakeConfig, shadow_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, scans: bool, is_said: bool
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(plan_module.logger, "warning_once", lambda message, *_: warnings.append(message))
    options = {"thresholds": str(shadow_folder)} if mode == "shadow" else {}
    Plan.resolve(make_config({**options, "mode": mode, "guard": "off"})).log(scans=scans)
    assert [warning for warning in warnings if "long enough to skip keys" in warning] == warnings
    assert bool(warnings) == is_said


def test_copies_need_no_store_and_have_a_guard(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(plan_module.logger, "info_once", lambda message, *args: messages.append(message % args))
    copies = {"mode": "shadow"}
    plan = Plan.resolve(make_config({**copies, "heavy": 0.02, "weight_floor": 3}))
    plan.log(more_memory=0.2)
    assert (plan.model_id, plan.shadow, plan.heavy, plan.guard) == (None, None, 0.02, "relax")
    assert plan.thresholds is not None
    assert plan.thresholds.label == "floor:3"
    assert plan.code_bytes == 32 + 16 + 4 == Plan.code_bytes_of(make_config(copies))
    assert plan.choices.refusal is None
    layer = plan.for_layer(0, num_heads=9, num_kv_heads=3, rank=0)
    assert layer is not None
    assert layer.tiers is not None
    assert (layer.shadow, layer.tiers.log_heavy) == (None, pytest.approx(math.log(0.02)))
    assert layer.counters.buffers.copies_read is not None
    assert "copies of keys and values" in messages[0]
    assert "52 bytes make the pages of the KV cache 20.0 % larger" in messages[0]
    plan = Plan.resolve(make_config({**copies, "heavy": 0}))
    assert plan.thresholds is not None
    assert plan.thresholds.label == "floor:1"
    every = plan.for_layer(0, num_heads=9, num_kv_heads=3, rank=0)
    assert every is not None
    assert every.tiers is not None
    assert every.tiers.log_heavy == -math.inf


def test_a_store_is_for_calibrated_shadow_keys(make_config: MakeConfig, shadow_folder: Path) -> None:
    named = {"mode": "shadow", "thresholds": str(shadow_folder)}
    plan = Plan.resolve(make_config(named))
    assert (plan.heavy, plan.shadow is not None) == (None, True)
    with pytest.raises(errors.SettingsError, match="thresholds: copies of keys and values need no calibration"):
        make_config(named | {"shadow_values": True})


def test_channels_without_a_kernel_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    make_shadow_store(folder, num_channels=48, **shape)
    with pytest.raises(
        errors.UnsupportedError,
        match=r"shadow\.num_channels: mode shadow has no kernels for 48 channels of heads of 64\. .*32 or 64 channels",
    ):
        make_config({"thresholds": str(folder), "mode": "shadow"})


@pytest.fixture
def measured(thresholds_folder: Path, model_folder: Path) -> Callable[..., Options]:
    """Writes evidence into the store of the tiny model; returns the options that name it."""
    save_file({"weights": np.ones(4, np.float32)}, model_folder / "model.safetensors")

    def record(*promises: store.Promise, **changes: Any) -> Options:
        manifest = store.load(thresholds_folder).manifest
        fields = {"weights_sha256": store.weights_sha256(model_folder), **changes}
        evidence = make_evidence(*promises, **fields)
        store.record_quality(thresholds_folder, evidence, model=manifest.model, architecture=manifest.architecture)
        return {"thresholds": str(thresholds_folder)}

    return record


def test_a_promise_is_served_said_and_kept_dense_where_nothing_was_measured(
    make_config: MakeConfig, measured: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(plan_module.logger, level, lambda message, *args: said.append(message % args))
    options = measured(make_promise(1.5, lengths=(2048, 8192)), make_promise(0.5, preset="exact", max_loss=0.05))
    plan = Plan.resolve(make_config(options))
    plan.log()
    assert plan.thresholds is not None
    assert (plan.thresholds.label, plan.differences, plan.model_id) == ("floor:1.5", (), None)
    assert said[1:] == [
        "toptheta: promised: perplexity within 0.5 % up to 8192 tokens, measured +0.31 +- 0.08 % at 2048 tokens on "
        "prose.txt"
    ]
    # rows of the shortest windows saw 1,793 keys and more
    assert plan.dense_rule == (1792, 0)
    assert replace(plan, automatic=DenseRule(2048, 30_000)).dense_rule == (2048, 30_000)
    assert plan.choices.labels == ["dense", "floor:1.5", "exact", "floor:0 to 1000"]
    early = Plan.resolve(make_config(options | {"min_context": 1000}))
    assert early.dense_rule == (1000, 0)
    assert early.differences == ("sparse from 1001 tokens on, measured from 1793 on",)


def test_a_server_that_is_not_what_was_measured_says_so_and_a_strict_one_does_not_start(
    make_config: MakeConfig, measured: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(plan_module.logger, "warning_once", lambda message, *args: said.append(message % args))
    options = measured(weights_sha256="b" * 64, dtype="bfloat16", quantization="awq")
    plan = Plan.resolve(make_config(options))
    plan.log()
    assert plan.differences == (
        "other weights than those measured",
        "dtype float32, measured with bfloat16",
        "quantization none, measured with awq",
        "up to 8192 tokens, measured up to 2048",
    )
    assert said == [f"toptheta: what is promised was measured otherwise: {'; '.join(plan.differences)}"]
    with pytest.raises(errors.UnsupportedError, match="strict: the promise was measured otherwise: other weights"):
        make_config(options | {"strict": True})
    make_config(measured() | {"strict": True}, max_model_len=2048)
    drafts = Plan.resolve(make_config(options | {"strict": True, "lossless": True}))
    assert (drafts.promised, drafts.differences, drafts.watch) == (None, (), None)
    with pytest.raises(errors.UnsupportedError, match="strict: nothing is promised"):
        make_config({"strict": True})


def test_without_evidence_the_default_floor_is_served_and_it_is_said(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(plan_module.logger, "info_once", lambda message, *args: said.append(message % args))
    plan = Plan.resolve(make_config())
    plan.log()
    assert f"thresholds floor:{DEFAULT_WEIGHT_FLOOR:g}" in said[0]
    assert said[1] == ("toptheta: nothing is promised: no quality was measured for this model and mode (toptheta tune)")
    assert (plan.promised, plan.dense_rule) == (None, (NUM_ANCHORS, 0))


def test_the_guard_goes_by_what_each_layer_lost_when_it_was_measured(
    make_config: MakeConfig, measured: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(plan_module.logger, "info_once", lambda message, *args: said.append(message % args))

    def bounds(**changes: Any) -> list[float]:
        plan = Plan.resolve(make_config(options | changes))
        plan.log()
        layers = [plan.for_layer(layer, num_heads=9, num_kv_heads=3, rank=0) for layer in range(4)]
        return [layer.guard.bound for layer in layers if layer is not None and layer.guard is not None]

    options = measured()
    assert bounds() == [0.5] * 4
    known = make_length(lost_mass_p99=(0.1, 0.3, 0.7))
    options = measured(make_promise().model_copy(update={"measured": (known,)}))
    assert bounds() == [0.125, 0.5, 0.5, 0.5]
    assert said[-1].endswith("where the promise was measured, 0.1 to 0.5 by layer")
    said.clear()
    assert bounds(max_lost_mass=0.25) == [0.25] * 4
    assert bounds(weight_floor=3) == [0.5] * 4  # promises nothing
    assert bounds(guard="off") == []
    assert not [line for line in said if "in place of max_lost_mass" in line]


def test_workers_report_the_promise(make_config: MakeConfig, measured: Callable[..., Options]) -> None:
    assert promised_of(Plan.resolve(make_config())) is None
    record = promised_of(Plan.resolve(make_config(measured())))
    promised = Promised.model_validate(record)
    assert (promised.max_loss, promised.max_kl, promised.max_length) == (0.5, None, 2048)
    assert (promised.change_percent, promised.change_error, promised.kl_divergence) == (0.31, 0.08, 0.0005)
    assert promised.differences == ["up to 8192 tokens, measured up to 2048"]


@pytest.mark.parametrize(("rank", "world_size", "kv_heads"), [(0, 3, [0]), (2, 3, [2]), (4, 9, [1]), (8, 9, [2])])
def test_tensor_parallel_ranks_take_their_heads(
    make_config: MakeConfig, tmp_path: Path, rank: int, world_size: int, kv_heads: list[int]
) -> None:
    folder = tmp_path / "random"
    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    store_factory.make_store(folder, max_length=4096, **shape)  # every head has coefficients of its own
    plan, heads = Plan.resolve(make_config({"thresholds": str(folder), "target": "k:8"})), 9 // world_size
    share = plan.for_layer(2, num_heads=heads, num_kv_heads=max(1, 3 // world_size), rank=rank)
    whole = plan.for_layer(2, num_heads=9, num_kv_heads=3, rank=0)
    assert share is not None
    assert whole is not None
    assert torch.equal(share.thresholds.coefficients, whole.thresholds.coefficients[rank * heads : (rank + 1) * heads])
    assert share.counters.kv_heads == kv_heads


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"target": "k:128"}, r"toptheta calibrate .*tiny --text FILE\.\.\. --k"),
        (
            {"mode": "shadow"},
            r"toptheta calibrate .*tiny --text FILE\.\.\. --mode shadow --out DIR; or .*shadow_values on",
        ),
    ],
)
def test_missing_thresholds_name_the_command_that_makes_them(
    make_config: MakeConfig, tmp_path: Path, options: Options, command: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(errors.StoreNotFound, match=command):
        make_config({"thresholds": str(empty), **options})


def test_damaged_thresholds_are_refused(make_config: MakeConfig, calibrated: Options, thresholds_folder: Path) -> None:
    (thresholds_folder / "thresholds.safetensors").write_bytes(b"damaged")
    with pytest.raises(errors.ChecksumMismatch):
        make_config(calibrated)


def test_a_store_that_nothing_would_be_read_of_is_refused(make_config: MakeConfig, thresholds_folder: Path) -> None:
    with pytest.raises(errors.SettingsError, match="thresholds: without a target.*k:128, or leave it out"):
        make_config({"thresholds": str(thresholds_folder)})


def test_curves_that_kernels_do_not_evaluate_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "cubic"
    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    store_factory.make_store(folder, degree=3, **shape)
    with pytest.raises(errors.UnsupportedError, match="degree: thresholds of degree 3, and up to 2 are served"):
        make_config({"thresholds": str(folder), "target": "k:8"})


@pytest.mark.parametrize("value", [-1, "nan", float("nan"), 1e9, "x", "inf", [3], None])
def test_floors_that_are_none(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    if value is not None:
        with pytest.raises(
            errors.SettingsError, match=r"^additional_config.toptheta.weight_floor: .*got .*known options"
        ):
            make_config({"weight_floor": value})
    if isinstance(value, str | float) and value == value:
        monkeypatch.setenv("TOPTHETA_WEIGHT_FLOOR", str(value))
        with pytest.raises(errors.SettingsError, match="^TOPTHETA_WEIGHT_FLOOR: "):
            make_config()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"weightfloor": 3},
            errors.SettingsError,
            r"toptheta.weightfloor: unknown option.*known options.*weight_floor",
        ),
        ({"target_k": 64}, errors.SettingsError, r"toptheta.target_k: unknown option"),
        ({"target": "k:0"}, errors.SettingsError, "greater than or equal to 1"),
        ({"target": "k:4096"}, errors.TargetOutOfRange, "calibrated are 8, 128"),
        ({"target": "half"}, errors.SettingsError, "unknown target 'half'"),
        ({"target": "floor:2"}, errors.SettingsError, "unknown target 'floor:2'.*give it as weight_floor"),
        ({"target": "k:8", "weight_floor": 2}, errors.SettingsError, "weight_floor and target are two ways"),
        ({"target": "k:8", "mode": "shadow"}, errors.SettingsError, "target: .*served in mode values only"),
        ({"shadow_values": True}, errors.SettingsError, "shadow_values: copies of values belong to mode shadow"),
        ({"heavy": 0.1}, errors.SettingsError, "heavy: without copies .* mode shadow"),
        ({"draft_tokens": 3}, errors.SettingsError, "draft_tokens: nothing is drafted. Leave it out, or set lossless"),
        ({"lossless": True, "weight_floor": 0}, errors.SettingsError, "weight_floor: drafts that skip nothing are no"),
        (
            {"lossless": True, "draft_tokens": 33},
            errors.SettingsError,
            "draft_tokens: .* a number from 1 to 32, or auto",
        ),
        ({"lossless": True, "draft_tokens": "many"}, errors.SettingsError, "draft_tokens: .* 1 to 32, or auto"),
        ({"lossless": True, "draft_tokens": True}, errors.SettingsError, "draft_tokens: .* 1 to 32, or auto"),
        ({"mode": "shadow", "shadow_values": False, "heavy": 0.1}, errors.SettingsError, "heavy: without copies"),
        ({"heavy": 2}, errors.SettingsError, "heavy.*less than or equal to 1"),
        ({"max_lost_mass": 1}, errors.SettingsError, "max_lost_mass.*less than 1"),
        ({"dense_layers": [9]}, errors.SettingsError, "dense_layers: the model has no layer 9"),
        ({"dense_layers": [-1]}, errors.SettingsError, "counted from 0"),
        ({"compensation": "vmc"}, errors.SettingsError, r"compensation.*'sdc\+vmc'"),
        ({"mode": "keys"}, errors.SettingsError, "mode.*'values' or 'shadow'"),
        ({"mode": "shadow"}, errors.ShadowMissing, "shadow: these thresholds came without shadow keys.*--mode shadow"),
    ],
)
def test_options_that_do_not_fit(
    make_config: MakeConfig, thresholds_folder: Path, options: Options, error: type[Exception], words: str
) -> None:
    if options.keys() & {"target", "mode"}:
        options = {"thresholds": str(thresholds_folder), **options}
    with pytest.raises(error, match=words):
        make_config(options)


def test_thresholds_of_another_architecture(make_config: MakeConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    store_factory.make_store(other, num_layers=4, num_heads=9, num_kv_heads=9, head_size=64, target_ks=(8, 128))
    with pytest.raises(errors.FingerprintMismatch, match="num_kv_heads.*9.*3"):
        make_config({"thresholds": str(other), "target": "k:8"})


def test_unknown_variable(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_WEIGHTFLOOR", "8")
    with pytest.raises(
        errors.SettingsError, match="TOPTHETA_WEIGHTFLOOR: unknown environment variable.*TOPTHETA_WEIGHT_FLOOR"
    ):
        make_config()


def test_what_kubernetes_sets_for_a_service_of_that_name(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"TOPTHETA_{name}", "tcp://10.0.0.1:8000")
    make_config()
    monkeypatch.setenv("TOPTHETA_PORTS", "1")
    with pytest.raises(errors.SettingsError, match="TOPTHETA_PORTS: unknown environment variable"):
        make_config()
