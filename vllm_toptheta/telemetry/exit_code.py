"""The exit code of a server whose engine has died: not 0, so that whoever watches the process sees it.

vLLM's API server ends by itself then, but with 0 (0.32), as if somebody had asked it to.
"""

from __future__ import annotations

import functools
from typing import Any

ENGINE_DIED = 1


def fail_when_engine_died(engine_client: Any) -> None:
    """Have the process end with `ENGINE_DIED` where the engine is dead before anybody has it shut down.

    Args:
        engine_client: vLLM's `EngineClient`, which the API server shuts down as the last thing it does; after that,
            an engine that was asked to stop looks like one that died.
    """
    shut_down = engine_client.shutdown
    is_first = True

    @functools.wraps(shut_down)
    def shutdown(*args: Any, **kwargs: Any) -> None:
        nonlocal is_first
        has_died = is_first and engine_client.errored
        is_first = False
        shut_down(*args, **kwargs)
        if has_died:
            raise SystemExit(ENGINE_DIED)

    engine_client.shutdown = shutdown
