"""What vLLM says when it starts: its own parser, its configuration, and our checks of that; no engine."""

from __future__ import annotations

import functools
from typing import Any

from vllm_toptheta.server.command import ServeCommand


def refusal(command: ServeCommand) -> str:
    """Why vLLM does not start with a command; empty if it does."""
    from vllm.engine.arg_utils import EngineArgs

    words = [word for flag in command.flags for word in flag.words]
    try:
        arguments = _parser().parse_args(["--model", command.model, *words])
        arguments.skip_tokenizer_init = True  # configurations are made of folders without one
        EngineArgs.from_cli_args(arguments).create_engine_config()
    except SystemExit:
        return "argparse"
    except Exception as error:  # of which class depends on who refuses
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def _parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_toptheta.backend import plugin

    plugin.register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())
