"""The command is tested on the evaluation's tiny model, store and texts."""

from tests.calibration.random_models import random_models_are_accepted
from tests.evaluation.conftest import folder

__all__ = ["folder", "random_models_are_accepted"]
