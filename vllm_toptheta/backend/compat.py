"""The differences between the vLLM versions that are supported, found by looking for features, not for numbers.

0.26         backends have no names of their own in the enum
0.27 - 0.33  AttentionBackendEnum.register exists

All of them have two model runners, which keep their requests in different places.
"""

from __future__ import annotations

import copyreg
import importlib
import os
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.settings import ALLOW_UNTESTED

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "TOPTHETA"
OLDEST, NEWEST = (0, 26), (0, 33)  # minor versions, both included


def check_version(version: str) -> None:
    """Refuse a vLLM whose backend contract nobody has compared with this code.

    Raises:
        UnsupportedError: `version` is older or newer than the supported ones, and `ALLOW_UNTESTED` is not set.
    """
    minor = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= minor <= NEWEST and os.environ.get(ALLOW_UNTESTED) != "1":
        supported = " to ".join(".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise UnsupportedError(
            f"attention backend toptheta supports vLLM {supported}, this is {version}",
            remedy=f"Install a supported version, or try this one with {ALLOW_UNTESTED}=1",
        )


def register_name(class_path: str) -> None:
    """Add the backend to vLLM's enum, and let the member pickle; once per process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if hasattr(AttentionBackendEnum, "register"):
        register_backend(NAME, class_path)
    else:
        register_backend(_new_member(AttentionBackendEnum, class_path), class_path)
    copyreg.pickle(AttentionBackendEnum, _reduce)


def _new_member(enum: Any, value: str) -> Any:
    """What later versions do in `AttentionBackendEnum.register`: an enum member made after its class."""
    member = object.__new__(enum)
    member._name_, member._value_ = NAME, value
    setattr(enum, NAME, member)
    enum._member_map_[NAME] = member
    enum._value2member_map_[value] = member
    enum._member_names_.append(NAME)
    return member


def _reduce(member: AttentionBackendEnum) -> tuple[Any, ...]:
    """Pickle our member by name.

    A spawned process unpickles its config before it loads plugins, and enum members pickle by a value that it does not
    know yet.
    """
    if member.name == NAME:
        return _restore, (member.name,)
    return type(member), (member.value,)


def _restore(name: str) -> AttentionBackendEnum:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_toptheta.backend.plugin import register

    register()
    return AttentionBackendEnum[name]


def install_page_tails(code_bytes_of: Callable[[Any], int]) -> None:
    """Have our layers' pages padded; called where layers are built, before vLLM asks what pages they need.

    In all versions the layer is asked, with the configuration. `AttentionBackend.customize_spec`, which came with 0.27,
    is not told the configuration, on which the length of a tail depends.

    Args:
        code_bytes_of: Bytes of a token's shadow key in each kv head, by the configuration; 0 without shadow keys.
    """
    from vllm.model_executor.layers.attention import Attention

    from vllm_toptheta.backend.pages import with_tail

    get_kv_cache_spec = Attention.get_kv_cache_spec
    if get_kv_cache_spec.__module__ == __name__:
        return
    known: list[tuple[Any, int]] = []  # of the last configuration; a model asks once for every layer

    def get_padded_spec(self: Any, vllm_config: Any) -> Any:
        spec = get_kv_cache_spec(self, vllm_config)
        if spec is None or self.attn_backend.get_name() != NAME:
            return spec
        if not known or known[0][0] is not vllm_config:
            known[:] = [(vllm_config, code_bytes_of(vllm_config))]
        return with_tail(spec, code_bytes=known[0][1])

    Attention.get_kv_cache_spec = get_padded_spec


def follow_batches(vllm_config: Any, follow: Callable[[Any, Any, Any, Any], None]) -> None:
    """Have the engine's model runner tell who stands in which row of the batch; called in a worker.

    Args:
        vllm_config: Says which of the runners it is.
        follow: Called before the metadata of every step is built, with the runner, the requests that are new to it, a
            collection of the ids of those that it knows, and the ids of the step's rows in order.

    Raises:
        UnsupportedError: The runner does not have the method that is looked for.
    """
    if vllm_config.use_v2_model_runner:
        module, method, requests_and_rows = "vllm.v1.worker.gpu.model_runner", "prepare_inputs", _v2_requests_and_rows
    else:
        module, method, requests_and_rows = "vllm.v1.worker.gpu_model_runner", "_prepare_inputs", _v1_requests_and_rows
    runner_class = importlib.import_module(module).GPUModelRunner  # also that of CPUs derives from it
    prepare = getattr(runner_class, method, None)
    if prepare is None:
        raise UnsupportedError(
            f"{module} does not tell which request stands in which row of a batch",
            field="per_request",
            remedy="Set it to false",
        )
    if prepare.__module__ == __name__:
        return

    def prepare_and_follow(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(runner, scheduler_output, *args, **kwargs)
        follow(runner, scheduler_output.scheduled_new_reqs, *requests_and_rows(runner, inputs))
        return inputs

    setattr(runner_class, method, prepare_and_follow)


def _v1_requests_and_rows(runner: Any, inputs: Any) -> tuple[Any, Any]:
    return runner.requests, runner.input_batch.req_ids


def _v2_requests_and_rows(runner: Any, inputs: Any) -> tuple[Any, Any]:
    return runner.req_states.req_id_to_index, inputs.req_ids


def without_decodes(common: CommonAttentionMetadata, num_decodes: int, num_decode_tokens: int) -> Any:
    """The part of a batch behind its decoding sequences, which stand in front.

    Args:
        common: The batch.
        num_decodes: Sequences that decode.
        num_decode_tokens: Their tokens.
    """
    changes: dict[str, Any] = {}
    for field in fields(common):
        value = getattr(common, field.name)
        if isinstance(value, torch.Tensor) and len(value) == common.num_reqs:
            changes[field.name] = value[num_decodes:]
    changes |= {
        "query_start_loc": common.query_start_loc[num_decodes:] - num_decode_tokens,
        "query_start_loc_cpu": common.query_start_loc_cpu[num_decodes:] - num_decode_tokens,
        "slot_mapping": common.slot_mapping[num_decode_tokens:],
        "num_reqs": common.num_reqs - num_decodes,
        "num_actual_tokens": common.num_actual_tokens - num_decode_tokens,
    }
    for name in ("positions", "_num_computed_tokens_cache", "_token_to_req_indices_cache"):
        if hasattr(common, name):
            changes[name] = None  # derived or optional; rebuilt from the rest where it is needed
    if getattr(common, "req_idx", None) is not None:
        changes["req_idx"] = common.req_idx[num_decodes:]
    return replace(common, **changes)
