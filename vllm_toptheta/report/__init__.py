"""The report: what a user of some thresholds may expect, as a page, figures and numbers."""

from vllm_toptheta.report.findings import Report
from vllm_toptheta.report.run import make_report

__all__ = ["Report", "make_report"]
