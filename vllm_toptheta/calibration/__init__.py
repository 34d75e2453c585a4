"""Calibration: runs a model over texts and writes thresholds for its heads as a store.

May import `errors`, `limits`, `whole_file`, `reference`, `store`.
"""

from vllm_toptheta.calibration.options import CalibrationOptions, Place, ShadowOptions
from vllm_toptheta.calibration.run import calibrate

__all__ = ["CalibrationOptions", "Place", "ShadowOptions", "calibrate"]
