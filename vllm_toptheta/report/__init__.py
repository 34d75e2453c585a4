"""The report: what a user of some thresholds may expect, as a page, figures and numbers.

May import `errors`, `limits`, `reference`, `store`, `calibration`, `evaluation`.
"""

from vllm_toptheta.report.quality import find_quality
from vllm_toptheta.report.record import Report
from vllm_toptheta.report.survivors import SurvivorOptions, measure_survivors

__all__ = ["Report", "SurvivorOptions", "find_quality", "measure_survivors"]
