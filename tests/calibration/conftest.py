from collections.abc import Iterator

import pytest
import torch

from tests.calibration.random_models import random_models_are_accepted

__all__ = ["random_models_are_accepted"]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, which spin while they wait for a core that another process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
