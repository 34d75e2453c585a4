from tests.calibration.random_models import random_models_are_accepted
from tests.one_thread import one_thread

__all__ = ["one_thread", "random_models_are_accepted"]
