"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import store_factory
from vllm_toptheta.store import ThresholdStore


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., ThresholdStore]:
    """Write a valid store below a temporary folder, by default as `acme--tiny`."""

    def make(folder_name: str = "acme--tiny", **fields: Any) -> ThresholdStore:
        return store_factory.make_store(tmp_path / folder_name, **fields)

    return make
