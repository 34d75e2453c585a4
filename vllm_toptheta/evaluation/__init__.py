"""Evaluation: what Top-Theta attention changes in a model's predictions, paired against dense attention."""

from vllm_toptheta.evaluation.quality import evaluate
from vllm_toptheta.evaluation.report import Comparison, QualityReport, quality_table

__all__ = ["Comparison", "QualityReport", "evaluate", "quality_table"]
