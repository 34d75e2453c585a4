"""Has an engine draft with the model that it serves, where our option `lossless` says so.

Replaces `EngineArgs.create_speculative_config` (0.26 to 0.33), by which vLLM learns that it speculates before anything
depends on it: with the served model as its own draft model, so that the scheduler keeps slots for drafts and the
sampler verifies them. Replaces `WorkerBase.__init__` (likewise), which every worker passes before it makes its model
runner: a runner takes what drafts by a name in its module, for there is no registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.capabilities import NAME
from vllm_toptheta.backend.hooks import expanded_options
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.errors import SettingsError
from vllm_toptheta.settings import OPTIONS_KEY, Settings

_RUNNER = "vllm.v1.worker.gpu_model_runner"  # that of CPUs derives from its class
_DRAFTER = "DraftModelProposer"


def install() -> None:
    """Let the option make engines speculate; called in every process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    replace(EngineArgs, "create_speculative_config", _speculating)
    replace(WorkerBase, "__init__", _drafting)


def _speculating(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_ours(args: Any, *arguments: Any, **named: Any) -> Any:
        settings = _settings(args)
        if settings is not None and settings.lossless:
            if args.speculative_config or getattr(args, "spec_method", None):
                raise SettingsError(
                    "drafts come from the served model itself",
                    field="lossless",
                    remedy="Leave --speculative-config out, or lossless",
                )
            args.speculative_config = {
                "method": "draft_model",
                "model": args.model,
                "num_speculative_tokens": settings.draft_tokens,
                # or a draft is compared with one token only, and most are rejected where tokens are sampled
                "draft_sample_method": "probabilistic",
            }
        return create(args, *arguments, **named)

    return create_ours


def _settings(args: Any) -> Settings | None:
    """Our options, if the arguments select our backend."""
    backends = (args.attention_backend, getattr(args.attention_config, "backend", None))
    if not any(str(getattr(one, "name", one)).upper() == NAME for one in backends if one is not None):
        return None
    return Settings.load((args.additional_config or {}).get(OPTIONS_KEY, {}))


def _drafting(init: Callable[..., None]) -> Callable[..., None]:
    def init_and_draft(worker: Any, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        init(worker, vllm_config, *arguments, **named)
        if not support_checks.is_selected(vllm_config):
            return
        from vllm.platforms import current_platform

        if vllm_config.speculative_config is not None and current_platform.is_cpu():
            expanded_options.install()
        options = (vllm_config.additional_config or {}).get(OPTIONS_KEY, {})
        if Settings.load(options).lossless:
            from vllm_toptheta.backend.self_drafts import SelfDrafts

            setattr(importlib.import_module(_RUNNER), _DRAFTER, SelfDrafts)

    return init_and_draft
