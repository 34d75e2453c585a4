"""The command `toptheta`."""

from vllm_toptheta.cli.main import main

__all__ = ["main"]
