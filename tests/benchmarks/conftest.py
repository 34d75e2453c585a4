from tests.calibration.random_models import random_models_are_accepted

__all__ = ["random_models_are_accepted"]
