"""The command `toptheta`: what a user types becomes calls of the other parts, which are imported when they are needed.

May import `errors`, `limits`, `whole_file`, `store`, `kernels`, `server`, `calibration`, `evaluation`, `report`,
`engine`, `soak`, `benchmarks`, `demo_model`.
"""

from vllm_toptheta.cli.main import main

__all__ = ["main"]
