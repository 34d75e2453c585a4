"""Targets and their labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store import Target, TargetSpec

specs = (
    st.builds(TargetSpec, k=st.integers(1, 1 << 20))
    | st.builds(TargetSpec, rows=st.integers(1, 1 << 20))
    | st.builds(TargetSpec, survivors=st.integers(1, 1 << 20))
    | st.integers(1, 999).map(lambda mass: TargetSpec(mass=mass / 1000))
    | st.builds(
        lambda k, longer, growth: TargetSpec(k=k, reference_length=k + longer, growth=growth / 100),
        st.integers(1, 5000),
        st.integers(1, 5000),
        st.integers(1, 100),
    )
)


@given(spec=specs)
@settings(derandomize=True, max_examples=100)
def test_a_label_is_read_as_it_was_written(spec: TargetSpec) -> None:
    assert TargetSpec.parse(spec.label) == spec


def test_a_bare_number_is_a_k() -> None:
    assert TargetSpec.parse(" 64 ") == TargetSpec(k=64)
    assert TargetSpec.parse("64").constant_k == 64


@pytest.mark.parametrize(
    "label",
    [
        "",
        "k",
        "k:",
        "k:0",
        "k:-1",
        "k:64@2048",
        "k:64^0.5",
        "k:64@2048^0",
        "k:64@2048^1.5",
        "k:64@64^0.5",
        "k:64@2048^.",
    ]
    + ["mass:0", "mass:1", "mass:1.5", "mass:x", "rows:0", "rows:0.5", "top:3", "k:64,k:32", "9" * 40],
)
def test_what_is_no_label_is_refused(label: str) -> None:
    with pytest.raises(SettingsError, match="mass:0.98") as caught:
        TargetSpec.parse(label, field="--target")
    assert caught.value.field == "--target"


def test_keys_grow_with_the_length() -> None:
    spec = TargetSpec.parse("k:64@2048^0.5")
    np.testing.assert_allclose(spec.keys([512, 2048, 8192]), [32, 64, 128])
    np.testing.assert_allclose(TargetSpec.parse("k:64").keys([512, 2048]), [64, 64])
    assert spec.constant_k is None
    with pytest.raises(ValueError, match="mass:0.98 is not a number of keys"):
        TargetSpec.parse("mass:0.98").keys(5)


def test_rows_that_see_no_more_than_their_keys_stay_dense() -> None:
    assert Target(k=64, min_length=100, max_length=200).dense_length == 64
    assert Target(mass=0.9, min_length=100, max_length=200).dense_length == 99
    growing = {"k": 64, "reference_length": 2048, "growth": 0.5, "max_length": 4096}
    assert Target(**growing, min_length=3).dense_length == 2  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="k < min_length"):
        Target(**growing, min_length=2)  # type: ignore[arg-type]
