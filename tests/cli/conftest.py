"""The command is tested on the evaluation's tiny model, store and texts."""

from tests.evaluation.conftest import folder

__all__ = ["folder"]
