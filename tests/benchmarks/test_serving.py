"""What the benchmark of whole engines refuses; its times need a quiet machine."""

from __future__ import annotations

import pytest

from vllm_toptheta.benchmarks.serving import ServingWorkload, compare
from vllm_toptheta.errors import BenchmarkError


@pytest.mark.parametrize("random_keys", [None, 100, 512])
def test_random_weights_need_more_keys_than_value_rows(random_keys: int | None) -> None:
    workload = ServingWorkload(
        model="any",
        context=4096,
        output_tokens=2,
        batch_size=1,
        repeats=1,
        random_rows=512,
        random_keys=random_keys,
    )
    with pytest.raises(BenchmarkError, match=r"--random-keys: .*\n?.*Choose a number above 512"):
        compare(workload, ["FLASH_ATTN", "TOPTHETA:shadow"], rounds=1)


def test_a_models_drafts_are_not_accepted_by_chance() -> None:
    workload = ServingWorkload(model="any", context=4096, output_tokens=2, batch_size=1, repeats=1, acceptance=0.98)
    with pytest.raises(BenchmarkError, match=r"--acceptance: .*Leave it out, or give --random-rows"):
        compare(workload, ["FLASH_ATTN", "TOPTHETA:lossless-tiers"], rounds=1)


@pytest.mark.parametrize(
    ("field", "value"), [("draft_tokens", "auto"), ("acceptance", 0.98)], ids=["draft tokens", "acceptance"]
)
def test_options_of_drafts_need_drafts(field: str, value: str | float) -> None:
    workload = ServingWorkload(
        model="any", context=4096, output_tokens=2, batch_size=1, repeats=1, random_rows=9, **{field: value}
    )
    with pytest.raises(BenchmarkError, match=rf"--{field.replace('_', '-')}: none of the backends drafts"):
        compare(workload, ["FLASH_ATTN", "TOPTHETA:tiers"], rounds=1)
