"""Evaluation: what Top-Theta attention changes in a model's predictions and answers, paired against dense attention.

May import `errors`, `limits`, `whole_file`, `reference`, `store`, `calibration`.
"""

from vllm_toptheta.evaluation.decode import DecodeOptions, evaluate_decode
from vllm_toptheta.evaluation.decode_report import DecodeReport, decode_table
from vllm_toptheta.evaluation.domains import Domain, Sample, named_paths, text_domain
from vllm_toptheta.evaluation.perplexity import evaluate_perplexity
from vllm_toptheta.evaluation.perplexity_report import Comparison, DomainReport, PerplexityReport, perplexity_tables
from vllm_toptheta.evaluation.probes import ProbeOptions, Probes
from vllm_toptheta.evaluation.subject import Subject
from vllm_toptheta.evaluation.tune import FLOORS, Goal, TuneOptions, tune_floors
from vllm_toptheta.evaluation.tuned import Tuned, read_tuned, tuned_file
from vllm_toptheta.evaluation.variants import COMPENSATIONS, MODES, Variant, expand_variants, floor_label

__all__ = [
    "COMPENSATIONS",
    "FLOORS",
    "MODES",
    "Comparison",
    "DecodeOptions",
    "DecodeReport",
    "Domain",
    "DomainReport",
    "Goal",
    "PerplexityReport",
    "ProbeOptions",
    "Probes",
    "Sample",
    "Subject",
    "TuneOptions",
    "Tuned",
    "Variant",
    "decode_table",
    "evaluate_decode",
    "evaluate_perplexity",
    "expand_variants",
    "floor_label",
    "named_paths",
    "perplexity_tables",
    "read_tuned",
    "text_domain",
    "tune_floors",
    "tuned_file",
]
