"""Where a request's wish is checked: in the process that takes requests in, so that a bad one gets HTTP 400.

vLLM checks parameters in `InputProcessor`, of offline engines too. The API server enters it only when it has started
to answer a stream, with status 200; hence the earlier check, in `AsyncLLM.generate`. Beam search leaves a request's
extra arguments behind, so there the request itself is looked at. All of these have kept the names and arguments used
here since vLLM 0.26.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend.levels import ARGUMENT, FIELD
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.errors import SettingsError

_LEVELS = "toptheta_levels"  # what an input processor's requests can ask for


def install(is_selected: Callable[[Any], bool]) -> None:
    """Wrap vLLM's methods; once per process, where a configuration selects our backend.

    Args:
        is_selected: Whether the engine of a `VllmConfig` runs on it.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(InputProcessor._validate_params, "toptheta"):
        return
    validate, generate = InputProcessor._validate_params, AsyncLLM.generate

    def check(processor: Any, params: Any) -> None:
        asked = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
        if asked is None or not is_selected(processor.vllm_config):
            return
        if not hasattr(processor, _LEVELS):
            setattr(processor, _LEVELS, Plan.resolve(processor.vllm_config).levels)
        try:
            getattr(processor, _LEVELS).parse(asked)
        except SettingsError as error:
            raise VLLMValidationError(str(error), parameter=FIELD) from None

    @functools.wraps(validate)
    def checked_validate(processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check(processor, params)
        return validate(processor, params, *args, **kwargs)

    @functools.wraps(generate)
    def checked_generate(engine: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(engine.input_processor, sampling_params)
        return generate(engine, prompt, sampling_params, *args, **kwargs)

    checked_validate.toptheta = True  # type: ignore[attr-defined]
    InputProcessor._validate_params, AsyncLLM.generate = checked_validate, checked_generate
    for request_class in (ChatCompletionRequest, CompletionRequest):
        _refuse_beam_search(request_class, VLLMValidationError)


def _refuse_beam_search(request_class: Any, error: type[Exception]) -> None:
    to_beam_search_params = request_class.to_beam_search_params

    @functools.wraps(to_beam_search_params)
    def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        if ARGUMENT in (request.vllm_xargs or {}):
            raise error(f"{FIELD}: beam search decodes as the server does, so nothing else can be asked for")
        return to_beam_search_params(request, *args, **kwargs)

    request_class.to_beam_search_params = checked
