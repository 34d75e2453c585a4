"""Targets and their labels."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store import Target, TargetSpec


@given(spec=st.builds(TargetSpec, k=st.integers(1, 1 << 20)))
@settings(derandomize=True, max_examples=100)
def test_a_label_is_read_as_it_was_written(spec: TargetSpec) -> None:
    assert TargetSpec.parse(spec.label) == spec


def test_a_bare_number_is_a_k() -> None:
    assert TargetSpec.parse(" 64 ") == TargetSpec(k=64)


@pytest.mark.parametrize(
    "label", ["", "k", "k:", "k:0", "k:-1", "k:6.5", "k:64@2048^0.5", "mass:0.98", "rows:64", "k:64,k:32", "9" * 40]
)
def test_what_is_no_label_is_refused(label: str) -> None:
    with pytest.raises(SettingsError, match="Write k:64") as caught:
        TargetSpec.parse(label, field="--target")
    assert caught.value.field == "--target"


@pytest.mark.parametrize(("min_length", "max_length"), [(64, 200), (201, 200)])
def test_a_target_covers_rows_that_see_more_than_k_keys(min_length: int, max_length: int) -> None:
    with pytest.raises(ValidationError, match="expected k < min_length <= max_length, got 64"):
        Target(k=64, min_length=min_length, max_length=max_length)
