"""What workers report, made up, and an engine that passes it on."""

from __future__ import annotations

from typing import Any

import torch

from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.kernels.cpu.scratch import Counted
from vllm_toptheta.telemetry.reader import STATS_RPC

PROMISED: dict[str, Any] = {
    "text": "promised: perplexity within 0.5 %",
    "max_loss": 0.5,
    "max_kl": None,
    "max_length": 2048,
    "change_percent": 0.31,
    "change_error": 0.08,
    "kl_divergence": 0.0005,
    "differences": ["dtype bfloat16, measured with float32"],
}
BEYOND: dict[str, Any] = {
    "max_share": 0.03,
    "is_alarming": True,
    "alarms": 2,
    "layers": [
        {"layer": 1, "lost_mass_p99": 0.1, "share": 0.08},
        {"layer": 2, "lost_mass_p99": 0.2, "share": 0.01},
    ],
}


def rank(*counters: LayerCounters, **changes: Any) -> dict[str, Any]:
    """The report of a worker with these layers."""
    totals = counters[0].settled().totals.tolist() if counters else [0] * 5
    decode_tokens, dense_tokens, _, decode_steps, asked_tokens = totals
    return {
        "mode": "values",
        "guard": "relax",
        "target": "k:128",
        "compensation": "sdc+vmc",
        "min_context": 128,
        "min_step_tokens": 0,
        "thresholds": "acme/tiny",
        "calibrated_lengths": (129, 4096),
        "choices": ["dense", "k:128"],
        "promised": None,
        "max_lost_mass": 0.5,
        "num_layers": 4,
        "num_kv_heads": 2,
        "value_row_bytes": 128,
        "decode_steps": decode_steps,
        "decode_tokens": decode_tokens,
        "dense_tokens": dense_tokens,
        "asked_tokens": asked_tokens,
        "requests": {},
        "layers": [record for layer in counters for record in layer.heads()],
        "lost_mass": [layer.histogram() for layer in counters],
        "guarded": [],
        "beyond_evidence": None,
        **changes,
    }


def counted(
    layer: int,
    kv_heads: list[int],
    rows_read: list[list[int]],
    lost_mass: float,
    *,
    num_short: int = 0,
    num_asked: int = 0,
    keys_read: list[list[int]] | None = None,
    copies_read: list[list[int]] | None = None,
) -> LayerCounters:
    """Counters after one step of sequences with 100 cached rows each.

    The first `num_short` were dense, and the last `num_asked` were decoded as their requests asked for.
    """
    counters = LayerCounters(
        layer, kv_heads, num_queries_per_kv=2, counts_keys=keys_read is not None, counts_copies=copies_read is not None
    )
    tokens = len(rows_read)
    order = torch.arange(tokens)
    is_sparse = (order >= num_short).long()[:, None]
    counters.scratch.add(
        counters.buffers,
        Counted(
            torch.tensor([tokens, num_short, 100 * tokens, 1, num_asked]),
            is_counted=is_sparse * (order < tokens - num_asked).long()[:, None],
            value_rows_read=torch.tensor(rows_read),
            lost_mass=is_sparse * torch.full((tokens, 2 * len(kv_heads)), lost_mass),
            keys_read=torch.tensor(rows_read if keys_read is None else keys_read),
            copies_read=None if copies_read is None else torch.tensor(copies_read),
        ),
    )
    return counters


class Engine:
    """What the routes need of vLLM's engine client.

    Attributes:
        answers: What the workers report; an exception is raised.
        questions: How often they were asked.
        errored: Whether the engine is dead.
    """

    def __init__(self, answers: list[dict[str, Any] | None] | Exception) -> None:
        self.answers = answers
        self.questions = 0
        self.errored = False

    async def collective_rpc(self, method: str) -> list[dict[str, Any] | None]:
        assert method == STATS_RPC
        self.questions += 1
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def shutdown(self) -> None:
        self.errored = True
