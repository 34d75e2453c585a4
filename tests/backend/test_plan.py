"""From options to thresholds: what is resolved, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig

from tests import store_factory
from tests.shadow_store import make_shadow_store
from vllm_toptheta import errors, store
from vllm_toptheta.backend import plan as plan_module
from vllm_toptheta.backend import plugin
from vllm_toptheta.backend.levels import COMMON
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.kernels.cpu.thresholds import thresholds_at, unread_ratios_at

MakeConfig = Callable[..., VllmConfig]


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_thresholds_and_dense_layers_come_from_the_store(make_config: MakeConfig) -> None:
    plan = Plan.resolve(make_config())
    assert plan.dense_layers == {0}
    assert plan.curve is not None
    assert plan.curve.label == "k:128"
    assert plan.for_layer(0, num_heads=9, num_kv_heads=3, rank=0) is None
    layer_plan = plan.for_layer(1, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    assert layer_plan.thresholds.coefficients.shape == (3, 3, 3)  # k:128, dense and k:8


def test_theta_is_evaluated_within_the_calibrated_lengths(make_config: MakeConfig) -> None:
    plan = Plan.resolve(make_config())
    lengths = torch.tensor([5, 129, 1000, 4096, 8000])
    rules = plan.levels.rules()[COMMON]
    layer_plan = plan.for_layer(2, num_heads=9, num_kv_heads=3, rank=0)
    assert layer_plan is not None
    log_lengths = lengths.clamp(*rules[2:].tolist()).float().log()
    kept = torch.zeros(5, 1, dtype=torch.bool)
    thetas = thresholds_at(layer_plan.thresholds, log_lengths, torch.zeros(5, dtype=torch.int64), kept)
    expected = 0.4 + 0.1 * lengths.clamp(129, 4096).float().log()
    torch.testing.assert_close(thetas, expected[:, None].expand(-1, 9))
    assert plan.curve is not None
    torch.testing.assert_close(torch.from_numpy(plan.curve.threshold(lengths.numpy())[:, 2].copy()), thetas)


def test_options_win_over_the_environment(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_TARGET_K", "8")
    monkeypatch.setenv("TOPTHETA_DENSE_LAYERS", "1,2")
    plan = Plan.resolve(make_config())
    assert plan.settings.target_k == 8
    assert plan.dense_layers == {1, 2}
    assert Plan.resolve(make_config({"target_k": 64})).settings.target_k == 64


def test_a_target_by_its_label(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    stored = store_factory.make_store(
        folder, target_ks=(8, 128), num_layers=4, num_heads=9, num_kv_heads=3, head_size=64
    )
    for options, label in (({}, "k:128"), ({"target_k": 8}, "k:8"), ({"target_k": 8, "target": "k:128"}, "k:128")):
        plan = Plan.resolve(make_config({"thresholds": str(folder), **options}))
        assert plan.curve is not None
        assert plan.curve.label == label
        layer_plan = plan.for_layer(3, num_heads=9, num_kv_heads=3, rank=0)
        assert layer_plan is not None
        expected = torch.tensor(stored.curve_of(label).coefficients[3])
        assert torch.equal(layer_plan.thresholds.coefficients[COMMON], expected)
    longer = make_config({"thresholds": str(folder), "target_k": 8, "min_context": 500})
    assert Plan.resolve(longer).max_dense_len == 500
    assert Plan.resolve(make_config({"thresholds": str(folder), "target_k": 64})).max_dense_len == 64


def test_shadow_keys_of_every_level(make_config: MakeConfig, shadow_folder: Path) -> None:
    plan = Plan.resolve(make_config({"thresholds": str(shadow_folder), "mode": "shadow", "target_k": 64}))
    stored = store.load(shadow_folder).shadow
    assert (plan.code_bytes, plan.guard_state) == (16, "unmeasured")
    layer_plan = plan.for_layer(2, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    shadow = layer_plan.shadow
    assert shadow is not None
    assert (shadow.num_sink, shadow.num_recent, shadow.codec.code_bytes) == (16, 128, 16)
    assert torch.equal(shadow.codec.encoder, torch.tensor(stored.encoder[2, 1:2]))
    # the server's own, dense, k:8 and k:128
    assert shadow.margin.shape == (4, 3)
    for level in (0, 2, 3):
        assert torch.equal(shadow.margin[level], torch.tensor(stored.margin[2, 3:6]))
    lengths = torch.tensor([200, 1000, 9000])
    log_lengths = lengths.clamp(*plan.levels.rules()[COMMON, 2:].tolist()).float().log()
    ratios = unread_ratios_at(shadow, log_lengths, COMMON)
    expected = stored.exp_threshold_scale(lengths.numpy())[:, 2, 3:6]
    torch.testing.assert_close(ratios, torch.from_numpy(expected.copy()))
    assert Plan.resolve(make_config({"thresholds": str(shadow_folder)})).code_bytes == 0


@pytest.mark.parametrize(
    ("mode", "scans", "is_said"), [("shadow", False, True), ("shadow", True, False), ("values", False, False)]
)
def test_a_server_of_short_steps_is_told_so(
    make_config: MakeConfig, shadow_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, scans: bool, is_said: bool
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(plan_module.logger, "warning_once", lambda message, *_: warnings.append(message))
    Plan.resolve(make_config({"thresholds": str(shadow_folder), "mode": mode, "guard": "off"})).log(scans=scans)
    assert [warning for warning in warnings if "long enough for shadow keys" in warning] == warnings
    assert bool(warnings) == is_said


def test_channels_without_a_kernel_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    make_shadow_store(folder, num_channels=48, **shape)
    make_config({"thresholds": str(folder)})
    with pytest.raises(
        errors.UnsupportedError,
        match=r"shadow\.num_channels: mode shadow has no kernels for 48 channels of heads of 64\. .*32 or 64 channels",
    ):
        make_config({"thresholds": str(folder), "mode": "shadow"})


@pytest.mark.parametrize(("rank", "world_size", "kv_heads"), [(0, 3, [0]), (2, 3, [2]), (4, 9, [1]), (8, 9, [2])])
def test_tensor_parallel_ranks_take_their_heads(
    make_config: MakeConfig, tmp_path: Path, rank: int, world_size: int, kv_heads: list[int]
) -> None:
    folder = tmp_path / "random"
    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    store_factory.make_store(folder, max_length=4096, **shape)  # every head has coefficients of its own
    plan, heads = Plan.resolve(make_config({"thresholds": str(folder)})), 9 // world_size
    share = plan.for_layer(2, num_heads=heads, num_kv_heads=max(1, 3 // world_size), rank=rank)
    whole = plan.for_layer(2, num_heads=9, num_kv_heads=3, rank=0)
    assert share is not None
    assert whole is not None
    assert torch.equal(
        share.thresholds.coefficients, whole.thresholds.coefficients[:, rank * heads : (rank + 1) * heads]
    )
    assert share.counters.kv_heads == kv_heads


def test_missing_thresholds_name_the_command_that_makes_them(make_config: MakeConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(errors.StoreNotFound, match=r"toptheta calibrate .*tiny --text FILE"):
        make_config({"thresholds": str(empty)})


def test_missing_thresholds_may_mean_dense(make_config: MakeConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    plan = Plan.resolve(make_config({"thresholds": str(empty), "on_missing": "dense"}))
    assert plan.curve is None
    assert plan.for_layer(3, num_heads=9, num_kv_heads=3, rank=0) is None
    assert int(plan.levels.rules()[COMMON, 1]) == 2**31 - 1  # every length is dense


def test_a_mistyped_path_is_never_taken_for_missing_thresholds(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(errors.StoreNotFound, match="nowhere"):
        make_config({"thresholds": str(tmp_path / "nowhere"), "on_missing": "dense"})


def test_damaged_thresholds_are_never_taken_for_missing_ones(make_config: MakeConfig, thresholds_folder: Path) -> None:
    (thresholds_folder / "thresholds.safetensors").write_bytes(b"damaged")
    with pytest.raises(errors.ChecksumMismatch):
        make_config({"on_missing": "dense"})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tarket_k": 64}, errors.SettingsError, r"toptheta.tarket_k: unknown option.*known options are.*target_k"),
        ({"target_k": 0}, errors.SettingsError, "target_k.*greater than or equal to 1"),
        ({"target_k": 4096}, errors.TargetOutOfRange, "calibrated are 8, 128"),
        ({"target": "k:4"}, errors.TargetOutOfRange, "no thresholds for k 4; calibrated are 8, 128"),
        ({"target": "half"}, errors.SettingsError, "unknown target 'half'"),
        ({"dense_layers": [9]}, errors.SettingsError, "dense_layers: the model has no layer 9"),
        ({"dense_layers": [-1]}, errors.SettingsError, "counted from 0"),
        ({"compensation": "vmc"}, errors.SettingsError, r"compensation.*'sdc\+vmc'"),
        ({"mode": "keys"}, errors.SettingsError, "mode.*'values' or 'shadow'"),
        ({"mode": "shadow"}, errors.ShadowMissing, "shadow: these thresholds came without shadow keys.*--mode shadow"),
    ],
)
def test_options_that_do_not_fit(
    make_config: MakeConfig, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_config(options)


def test_thresholds_of_another_architecture(make_config: MakeConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    store_factory.make_store(other, num_layers=4, num_heads=9, num_kv_heads=9, head_size=64, target_ks=(8, 128))
    with pytest.raises(errors.FingerprintMismatch, match="num_kv_heads.*9.*3"):
        make_config({"thresholds": str(other)})


def test_unknown_variable(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_TARGETK", "8")
    with pytest.raises(errors.SettingsError, match="TOPTHETA_TARGETK: unknown environment variable.*TOPTHETA_TARGET_K"):
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
