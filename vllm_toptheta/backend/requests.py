"""What each running request asked for, and the offsets of the rows that they stand in, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_toptheta.backend.hooks import batch_rows
from vllm_toptheta.backend.layers import our_impls
from vllm_toptheta.backend.request_choices import ARGUMENT, COMMON, KEEP_ALL, LOSSY, RequestChoices, is_lossy
from vllm_toptheta.errors import SettingsError

logger = init_logger("vllm.toptheta")


def request_offsets(
    choices: RequestChoices, vllm_config: Any, max_num_rows: int, device: torch.device | str = "cpu"
) -> RequestOffsets:
    """What the requests of this rank ask for, the same for all of its layers; the first call makes it.

    Args:
        choices: What can be asked for.
        vllm_config: The engine's.
        max_num_rows: Rows of the largest batch, padding included.
        device: Where the offsets go.

    Raises:
        UnsupportedError: The model runner does not tell which request stands in which row of a batch.
    """
    for impl in our_impls(vllm_config):
        if impl.requests is not None:
            return impl.requests
    if choices.refusal is None or vllm_config.kv_transfer_config is not None:
        batch_rows.install(vllm_config)
    return RequestOffsets(choices, max_num_rows, device)


class RequestOffsets:
    """The requests of one rank.

    Captured graphs refer to `offsets`, so it never moves, and while no request asks for anything nobody writes to it.

    Args:
        choices: What can be asked for.
        max_num_rows: Rows of the largest batch, padding included.
        device: Where the offsets go.

    Attributes:
        offsets: [max_num_rows] float32, what is added to the thresholds of each row of the next step.
        lossy_rows: Rows of the next step whose answers are not verified; empty where none are.
        arrived_rows: Rows of the next step whose requests are scheduled for the first time, or again: a connector may
            have brought what they stand on.
        counts: Requests that asked for something, by its kind.
    """

    def __init__(self, choices: RequestChoices, max_num_rows: int, device: torch.device | str = "cpu") -> None:
        self.counts: Counter[str] = Counter()
        self._choices = choices
        self._asked: dict[str, float] = {}  # requests that are decoded as the server does are left out
        self._lossy: set[str] = set()
        self.lossy_rows: list[int] = []
        self.arrived_rows: list[int] = []
        self._rows = [COMMON] * max_num_rows
        self.offsets = torch.tensor(self._rows, device=device)

    def step(
        self,
        new_requests: Collection[Any],
        running: Collection[str],
        req_ids: Sequence[str],
        resumed: Collection[str] = (),
    ) -> None:
        """Take in what changed, and put the offsets of the next step's requests into their rows.

        Args:
            new_requests: vLLM's `NewRequestData` of requests that this rank sees for the first time, or again.
            running: Ids of all requests that the rank knows of.
            req_ids: Requests of the next step, in the order of the batch's rows.
            resumed: Those among them that were preempted, where vLLM does not count them as new.
        """
        for request in new_requests:
            self._add(request)
        arrived = {request.req_id for request in new_requests}.union(resumed)
        self.arrived_rows = [row for row, req_id in enumerate(req_ids) if req_id in arrived] if arrived else []
        for req_id in self._asked.keys() - running:
            del self._asked[req_id]
        self._lossy.intersection_update(running)
        self.lossy_rows = [row for row, req_id in enumerate(req_ids) if req_id in self._lossy] if self._lossy else []
        if not self._asked and not any(self._rows):
            return
        rows = [self._asked.get(req_id, COMMON) for req_id in req_ids]
        rows += [COMMON] * (len(self._rows) - len(rows))
        if rows != self._rows:
            self._rows = rows
            # in stream order behind the last step's kernels, and the source is copied before this returns
            with torch.inference_mode():
                self.offsets.copy_(torch.tensor(rows), non_blocking=True)

    def _add(self, request: Any) -> None:
        # an id may come back with other arguments
        self._asked.pop(request.req_id, None)
        self._lossy.discard(request.req_id)
        asked = (getattr(request.sampling_params, "extra_args", None) or {}).get(ARGUMENT)
        if asked is None:
            return
        try:
            offset, unverified = self._choices.parse(asked), is_lossy(asked)
        except SettingsError as error:
            # it came past the API server, which would have refused it
            logger.warning("toptheta: request %s is decoded densely: %s", request.req_id, error)
            offset, unverified = KEEP_ALL, False
        if unverified:
            self._lossy.add(request.req_id)
        if offset != COMMON:
            self._asked[request.req_id] = offset
        if not _is_resumed(request):
            self.counts[LOSSY if unverified else self._choices.kind(offset)] += 1


def _is_resumed(request: Any) -> bool:
    """Whether a new request has been here before: vLLM's V2 runner forgets those that are preempted."""
    prefill, prompt = getattr(request, "prefill_token_ids", None), request.prompt_token_ids
    return prefill is not None and prompt is not None and len(prefill) > len(prompt)
