"""`python -m vllm_toptheta.server` is `toptheta serve`."""

from __future__ import annotations

import sys

from vllm_toptheta.cli import main

sys.argv[1:1] = ["serve"]
main()
