"""The flags of `toptheta serve` are the options of the backend."""

from __future__ import annotations

import inspect

from vllm_toptheta.cli.serve import serve
from vllm_toptheta.settings import Settings


def test_every_option_has_a_flag() -> None:
    flags = set(inspect.signature(serve).parameters) - {"arguments", "config", "check", "device"}
    assert flags == set(Settings.model_fields)
