"""What a report says of the server's environment."""

from __future__ import annotations

import pytest

from vllm_toptheta.soak.run import server_environment


def test_settings_without_paths_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    found = server_environment()
    assert found["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "secret" not in found.values()
