"""Has the process that takes requests in check what they ask for, so that a bad one gets HTTP 400.

Replaces `InputProcessor._validate_params`, that of offline engines too, and `AsyncLLM.generate`, because the API server
enters the former only when it has started to answer a stream, with status 200. Beam search leaves a request's extra
arguments behind, so `to_beam_search_params` of both kinds of request is replaced as well. All of them have kept the
names and arguments used here from 0.26 to 0.33, and none asks a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.request_choices import ARGUMENT, FIELD
from vllm_toptheta.errors import SettingsError

_CHOICES = "toptheta_choices"  # of an input processor: what its requests can ask for


def install() -> None:
    """Check requests; called where a configuration selects our backend."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    replace(InputProcessor, "_validate_params", _validating)
    replace(AsyncLLM, "generate", _generating)
    for request_class in (ChatCompletionRequest, CompletionRequest):
        replace(request_class, "to_beam_search_params", _without_beam_search)


def _validating(validate: Callable[..., Any]) -> Callable[..., Any]:
    def checked_validate(processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(processor, params)
        return validate(processor, params, *args, **kwargs)

    return checked_validate


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    def checked_generate(engine: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(engine.input_processor, sampling_params)
        return generate(engine, prompt, sampling_params, *args, **kwargs)

    return checked_generate


def _without_beam_search(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        if ARGUMENT in (request.vllm_xargs or {}):
            raise _error(f"{FIELD}: beam search decodes as the server does, so nothing else can be asked for")
        return to_beam_search_params(request, *args, **kwargs)

    return checked


def _check(processor: Any, params: Any) -> None:
    asked = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
    if asked is None or not support_checks.is_selected(processor.vllm_config):
        return
    if not hasattr(processor, _CHOICES):
        setattr(processor, _CHOICES, Plan.resolve(processor.vllm_config).choices)
    try:
        getattr(processor, _CHOICES).parse(asked)
    except SettingsError as error:
        raise _error(str(error), parameter=FIELD) from None


def _error(message: str, **options: Any) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(message, **options)
