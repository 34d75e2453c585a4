"""Calibration: runs a model over texts and writes thresholds for its heads as a store."""

from vllm_toptheta.calibration.run import calibrate

__all__ = ["calibrate"]
