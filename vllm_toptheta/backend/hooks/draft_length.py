"""Has vLLM's scheduler draft as many tokens as were fastest, where our option `draft_tokens` is auto.

Replaces `Scheduler.__init__` and `Scheduler.update_from_output` (0.26 to 0.33). The scheduler takes the number from a
table by batch size, for which the runners capture graphs of all the numbers in it; what stands in the table's place
here times each step, whose end only the scheduler sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.drafts.length import DraftLength
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.settings import Settings


def install() -> None:
    """Let the option choose; called in every process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    replace(Scheduler, "__init__", _choosing)
    replace(Scheduler, "update_from_output", _timing)


def numbers(most: int) -> dict[str, Any]:
    """What vLLM's speculative configuration has to say, so that there are graphs for each number of drafts.

    Args:
        most: The largest.
    """
    # by batch size, first and last: which one does not matter, except that there are graphs up to the last of a range
    return {"num_speculative_tokens_per_batch_size": [(1, 1, most), (2, 2, 0), (3, 3, most // 2), (4, 1 << 20, most)]}


def _choosing(init: Callable[..., None]) -> Callable[..., None]:
    def init_and_choose(scheduler: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(scheduler, vllm_config, *args, **kwargs)
        if not support_checks.is_selected(vllm_config):
            return
        settings = Settings.of_engine(vllm_config)
        if settings.lossless and settings.draft_tokens == "auto" and scheduler.dynamic_sd_lookup is not None:
            # the first entry is of no batch
            scheduler.dynamic_sd_lookup = DraftLength(scheduler.dynamic_sd_lookup[1:])

    return init_and_choose


def _timing(update: Callable[..., Any]) -> Callable[..., Any]:
    def update_and_time(scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        length = getattr(scheduler, "dynamic_sd_lookup", None)
        if not isinstance(length, DraftLength):
            return update(scheduler, scheduler_output, model_runner_output)
        scheduled = scheduler_output.num_scheduled_tokens
        # before those that end are taken out
        requests = [scheduler.requests[name] for name in scheduled if name in scheduler.requests]
        num_cached = sum(request.num_computed_tokens for request in requests)
        result = update(scheduler, scheduler_output, model_runner_output)
        length.step(
            len(scheduled),
            num_cached,
            sum(map(len, model_runner_output.sampled_token_ids or ())),
            is_plain=not scheduler_output.scheduled_new_reqs
            and max(scheduled.values(), default=0) <= scheduler.num_spec_tokens + 1,
        )
        return result

    return update_and_time
