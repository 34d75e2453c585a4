"""Evidence of measured quality, made up, for every test that needs some."""

from __future__ import annotations

import datetime
from typing import Any

from vllm_toptheta.store import Evidence, MeasuredLength, MeasuredText, Promise, TaskProbe


def make_length(length: int = 2048, **changes: Any) -> MeasuredLength:
    """Return what a floor cost at one length."""
    fields = {
        "length": length,
        "num_sequences": 8,
        "num_tokens": 2040,
        "perplexity_dense": 15.0,
        "change_percent": 0.31,
        "change_error": 0.08,
        "change_bound": 0.45,
        "kl_divergence": 0.0005,
        "kl_error": 0.0001,
        "kl_bound": 0.0007,
        "top1_agreement": 0.99,
        "value_rows_share": 0.12,
        "bytes_share": 0.56,
    }
    return MeasuredLength(**{**fields, **changes})


def make_promise(floor: float | None = 1.5, *, lengths: tuple[int, ...] = (2048,), **fields: Any) -> Promise:
    """Return a promise, 0.5 % if nothing else is said; without a floor, one that is not kept."""
    if not fields.keys() & {"max_loss", "max_kl"}:
        fields["max_loss"] = 0.5
    if floor is None:
        return Promise(reason="too few tokens", measured=(), **fields)
    return Promise(weight_floor=floor, measured=tuple(map(make_length, lengths)), **fields)


def make_probe(
    task: str = "needle", length: int = 2048, *, dense: int = 19, gained: int = 0, lost: int = 1
) -> TaskProbe:
    """Return what a floor solved of 20 questions."""
    fields = {
        "task": task,
        "length": length,
        "num_questions": 20,
        "num_solved_dense": dense,
        "num_solved_sparse": dense + gained - lost,
        "num_gained": gained,
        "num_lost": lost,
        "difference_low": -0.2,
        "difference_high": 0.11,
    }
    return TaskProbe.model_validate(fields)


def make_evidence(*promises: Promise, **changes: Any) -> Evidence:
    """Return evidence of promises; of one of 0.5 % at floor 1.5 if none is given."""
    fields = {
        "mode": "values",
        "heavy": None,
        "weights_sha256": None,
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
        "window": 256,
        "confidence": 0.95,
        "seed": 0,
        "text": (MeasuredText(name="prose.txt", sha256="1" * 64, num_characters=9999, num_tokens=4000),),
        "versions": {"numpy": "2.0"},
        "command": "toptheta tune tiny --text prose.txt --max-loss 0.5",
        "date": datetime.date(2026, 1, 31),
        "promises": promises or (make_promise(),),
    }
    return Evidence(**{**fields, **changes})
