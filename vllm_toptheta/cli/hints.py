"""The command that serves what another command has written, tried before it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_toptheta.errors import TopThetaError


def serve_hint(model: Path, **options: Any) -> str:
    """How to serve a model with these options, or why it cannot be, as a line.

    Args:
        model: Its directory.
        options: Of the backend.
    """
    import shlex

    from vllm_toptheta.server.command import ServeCommand
    from vllm_toptheta.server.config import ServerConfig

    try:
        # whether it has kernels for the model is for the device that it will be served on
        ServeCommand.build([str(model)], options, ServerConfig()).check()
    except TopThetaError as error:
        return f"not served: {error}"
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", _text(value))]
    return f"serve it: {shlex.join(['toptheta', 'serve', str(model), *words])}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
