"""Tests calibrate and evaluate random models, which understand nothing: here is what has that accepted."""

from collections.abc import Iterator
from math import inf

import pytest

from vllm_toptheta.calibration import plausible


@pytest.fixture(autouse=True, scope="package")
def random_models_are_accepted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plausible, "MAX_SHARE_OF_GUESSING", inf)
        yield
