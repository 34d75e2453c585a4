"""Other projects' thresholds: read into a store where they can be, written from one as far as they can be expressed."""

from vllm_toptheta.interchange.modelopt import export_modelopt, refuse_modelopt
from vllm_toptheta.interchange.paper import import_paper

__all__ = ["export_modelopt", "import_paper", "refuse_modelopt"]
