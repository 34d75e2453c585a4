"""What flags, and vLLM's configuration, ask for, and which connectors are served where."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_toptheta.support import Connector, Engine, engine_reasons, kernel_reasons


def transfer(name: str, module: str | None = None, **extra: Any) -> Connector:
    """What a --kv-transfer-config asks for."""
    found = Connector.of(
        {"kv_connector": name, "kv_connector_module_path": module, "kv_connector_extra_config": extra or None}
    )
    assert found is not None
    return found


FILES = transfer("ExampleConnector", shared_storage_path="/somewhere")
BY_A_SPEC = transfer("OffloadingConnector", spec_name="Mine", spec_module_path="mine")
OFFLOADING, SIMPLE = transfer("OffloadingConnector", cpu_bytes_to_use=1), transfer("SimpleCPUOffloadConnector")
NIXL = [transfer(name) for name in ("NixlConnector", "NixlPullConnector")]
TIERS = transfer("OffloadingConnector", spec_name="TieringOffloadingSpec")
DISK = transfer("SimpleCPUOffloadConnector", kv_offload_backend="disk")


def test_nothing_is_asked_for() -> None:
    assert Connector.of({}) is None


@pytest.mark.parametrize("content", [{"kv_connector": None}, {"kv_role": "kv_both"}, {"kv_connector": ""}])
def test_a_configuration_without_a_name_is_refused(content: dict[str, Any]) -> None:
    (reason,) = engine_reasons(Engine("cpu", connector=Connector.of(content)))
    assert str(reason).startswith("--kv-transfer-config: only ExampleConnector, NixlConnector, and")


@pytest.mark.parametrize(
    ("backend", "is_simple", "name"),
    [
        *((backend, False, "OffloadingConnector") for backend in (None, "native")),
        ("native", True, "SimpleCPUOffloadConnector"),
        *(("lmcache", is_simple, "LMCacheMPConnector") for is_simple in (False, True)),
    ],
)
def test_a_size_chooses_the_connector(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, is_simple: bool, name: str
) -> None:
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", str(int(is_simple)))
    # whatever else is given
    found = Connector.of({"kv_connector": "ExampleConnector"}, offloads=True, offloading_backend=backend)
    assert found == Connector(name, "--kv-offloading-size")


@pytest.mark.parametrize("content", ["text", 3, ["a"], {"spec_name": {"of": "no use"}}])
def test_content_of_any_kind(content: Any) -> None:
    found = Connector.of({"kv_connector": "OffloadingConnector", "kv_connector_extra_config": content})
    assert found is not None
    assert found.stays_on_the_host == (not isinstance(content, dict))


@pytest.mark.parametrize("connector", [FILES, BY_A_SPEC, *NIXL])
def test_those_that_were_run_on_cpus(connector: Connector) -> None:
    assert engine_reasons(Engine("cpu", connector=connector)) == []


@pytest.mark.parametrize("connector", [FILES, BY_A_SPEC, *NIXL])
def test_only_nixl_asks_for_its_package(connector: Connector) -> None:
    reasons = engine_reasons(Engine("cpu", connector=connector, has_nixl=False))
    assert connector.is_nixl == bool(reasons)
    for reason in reasons:
        assert str(reason).startswith(f"--kv-transfer-config {connector.name}: the package nixl is not installed")
        assert "pip install nixl" in str(reason.remedy)


@pytest.mark.parametrize("connector", [OFFLOADING, SIMPLE, TIERS, DISK])
def test_what_vllm_copies_from_gpus_only(connector: Connector) -> None:
    (reason,) = engine_reasons(Engine("cpu", connector=connector))
    assert reason.text.startswith("vLLM offloads pages from GPUs to the host")
    assert "VLLM_CPU_KVCACHE_SPACE" in str(reason.remedy)


OTHERS = [
    *(transfer(name) for name in ("NixlPushConnector", "LMCacheConnectorV1", "MultiConnector", "MooncakeConnector")),
    *(transfer(name, "mine") for name in ("ExampleConnector", "OffloadingConnector", "NixlConnector", "MyConnector")),
]


@pytest.mark.parametrize("connector", OTHERS, ids=lambda one: one.name)
def test_all_others_are_refused(connector: Connector) -> None:
    (reason,) = engine_reasons(Engine("cpu", connector=connector))
    assert str(reason).startswith(f"--kv-transfer-config {connector.name}: only ExampleConnector, NixlConnector, and")
    (reason,) = engine_reasons(Engine("gpu", connector=connector))
    assert "without the sums of values" in reason.text


@pytest.mark.parametrize("connector", [FILES, BY_A_SPEC, TIERS, DISK, *NIXL])
def test_gpus_get_no_sums_from_files_and_other_engines(connector: Connector) -> None:
    (reason,) = engine_reasons(Engine("gpu", connector=connector))
    assert "without the sums of values" in reason.text


@pytest.mark.parametrize("connector", [OFFLOADING, SIMPLE])
def test_gpus_offload_to_the_host(connector: Connector) -> None:
    def reasons(**asked: Any) -> list[str]:
        engine = Engine("gpu", connector=connector, **asked)
        return [reason.text for reason in engine_reasons(engine)]

    assert reasons() == []
    assert reasons(splits_pages=False) == ["this vLLM has no pages with rows for sums of values"]
    assert reasons(cache_dtype="fp8") == ["pages that a connector copies have room for sums of 16-bit values only"]


@pytest.mark.parametrize("has_connector", [True, False])
def test_on_gpus_they_leave_no_room_for_copies(has_connector: bool) -> None:
    engine = Engine("gpu", connector=OFFLOADING if has_connector else None)
    heads = {"head_size": 128, "num_heads": 32, "num_kv_heads": 8, "is_sparse": True, "has_copies": True}
    expected = ["on GPUs, pages that a connector copies have no room for shadow keys or copies"]
    found = [reason.text for reason in kernel_reasons(engine, mode="shadow", **heads)]
    assert found == (expected if has_connector else [])
