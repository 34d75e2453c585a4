"""Has an engine draft with the model that it serves, where our option `lossless` says so.

Replaces `EngineArgs.create_speculative_config` (0.26 to 0.33), by which vLLM learns that it speculates before anything
depends on it: with the served model as its own draft model, so that the scheduler keeps slots for drafts and the
sampler verifies them. Replaces `WorkerBase.__init__` (likewise), which every worker passes before it makes its model
runner: a runner takes what drafts by a name in its module (V1: `DraftModelProposer`, V2: `init_speculator` since 0.32),
for there is no registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.capabilities import NAME
from vllm_toptheta.backend.hooks import draft_length, expanded_options
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.errors import SettingsError
from vllm_toptheta.settings import Settings

# by which names the runners make what drafts
_V1_RUNNER, _V1_DRAFTER = "vllm.v1.worker.gpu_model_runner", "DraftModelProposer"  # the CPUs' derives from the GPUs'
_V2_RUNNER, _V2_DRAFTER = "vllm.v1.worker.gpu.model_runner", "init_speculator"


def install() -> None:
    """Let the option make engines speculate; called in every process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    replace(EngineArgs, "create_speculative_config", _speculating)
    replace(WorkerBase, "__init__", _drafting)


def _speculating(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_ours(args: Any, *arguments: Any, **named: Any) -> Any:
        settings = _settings(args)
        if settings is None or not settings.lossless:
            return create(args, *arguments, **named)
        if args.speculative_config or getattr(args, "spec_method", None):
            raise SettingsError(
                "drafts come from the served model itself",
                field="lossless",
                remedy="Leave --speculative-config out, or lossless",
            )
        args.speculative_config = {
            "method": "draft_model",
            "model": args.model,
            "revision": args.revision,
            "code_revision": args.code_revision,
            "num_speculative_tokens": settings.most_draft_tokens,
            # or a draft is compared with one token only, and most are rejected where tokens are sampled
            "draft_sample_method": "probabilistic",
        }
        if settings.draft_tokens == "auto":
            args.speculative_config |= draft_length.numbers(settings.most_draft_tokens)
        try:
            made = create(args, *arguments, **named)
        finally:
            args.speculative_config = None  # nobody gave it
        # what vLLM has read of the model again lacks what flags change of it, such as how long sequences may be
        made.draft_model_config = made.target_model_config
        return made

    return create_ours


def _settings(args: Any) -> Settings | None:
    """Our options, if the arguments select our backend."""
    backends = (args.attention_backend, getattr(args.attention_config, "backend", None))
    if not any(str(getattr(one, "name", one)).upper() == NAME for one in backends if one is not None):
        return None
    return Settings.of_engine(args)


def _drafting(init: Callable[..., None]) -> Callable[..., None]:
    def init_and_draft(worker: Any, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        init(worker, vllm_config, *arguments, **named)
        if not support_checks.is_selected(vllm_config):
            return
        from vllm.platforms import current_platform

        if vllm_config.speculative_config is not None and current_platform.is_cpu():
            expanded_options.install()
        if not Settings.of_engine(vllm_config).lossless:
            return
        if vllm_config.use_v2_model_runner:
            from vllm_toptheta.backend.drafts.v2_runner import SelfSpeculator

            setattr(
                importlib.import_module(_V2_RUNNER),
                _V2_DRAFTER,
                lambda config, device, *_: SelfSpeculator(config, device),
            )
        else:
            from vllm_toptheta.backend.drafts.v1_runner import SelfDrafts

            setattr(importlib.import_module(_V1_RUNNER), _V1_DRAFTER, SelfDrafts)

    return init_and_draft
