"""The CPU backend's layers over a few engine steps, for `tools.digest`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.engine.arg_utils import EngineArgs

from tests import store_factory
from tests.backend.conftest import CONFIG, STORED
from tests.backend.cpu_harness import Harness, Step, asking
from tests.shadow_store import make_shadow_store
from vllm_toptheta.backend import cpu, plugin
from vllm_toptheta.kernels.pages import value_sum_view

MODES: dict[str, dict[str, Any]] = {
    f"{name}, {dtype}, pages of {block_size}": {"options": options, "dtype": dtype, "block_size": block_size}
    for name, options in {
        "values": {},
        "values, none": {"compensation": "none"},
        "values, sdc": {"compensation": "sdc"},
        "values, calibrated": {"target": "k:128"},
        "shadow": {"mode": "shadow"},
    }.items()
    for dtype, block_size in (("float32", 16), ("bfloat16", 32))
}
# prompts, a mixed step, decoding, a step whose sequences ask for something
STEPS = (
    Step([300, 129, 640, 16], [300, 129, 640, 16], [True] * 4),
    Step([301, 150, 641, 17], [1, 21, 1, 1], [False, True, False, False]),
    Step([302, 151, 642, 18], [1, 1, 1, 1], [False] * 4),
    Step([303, 152, 643, 19], [1, 1, 1, 1], [False] * 4),
)


def layers(name: str) -> tuple[torch.Tensor, list[Any]]:
    """Outputs of all layers and steps in one tensor; what was counted, and the page tails."""
    mode = MODES[name]
    with _harness(**mode) as harness:
        outputs = []
        for step in STEPS:
            if step is STEPS[-1]:
                asking(harness, ["dense", None, None, None])
            outputs += [output.float().flatten() for output in harness.run(step)[1]]
        tails = [value_sum_view(cache).nan_to_num(0.0) for cache in harness.caches]
        return torch.cat(outputs), [harness.counted(), tails]


@contextmanager
def _harness(options: dict[str, Any], dtype: str, block_size: int) -> Iterator[Harness]:
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(cpu, "get_tensor_model_parallel_rank", return_value=0),
        mock.patch.dict("os.environ", {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}),
    ):
        plugin.register()
        folder = Path(scratch)
        (folder / "tiny").mkdir()
        (folder / "tiny" / "config.json").write_text(json.dumps(CONFIG))
        make = make_shadow_store if options.get("mode") == "shadow" else store_factory.make_store
        make(folder / "acme--tiny", **STORED)
        stored = {"thresholds": str(folder / "acme--tiny")} if options.keys() & {"target", "mode"} else {}
        config = EngineArgs(
            model=str(folder / "tiny"),
            skip_tokenizer_init=True,
            attention_backend="toptheta",
            dtype=dtype,
            max_model_len=8192,
            enforce_eager=True,
            block_size=block_size,
            additional_config={"toptheta": {**options, **stored}},
        ).create_engine_config()
        yield Harness(config, block_size, [1024] * 4)
