"""What the installed vLLM can do, told by its files, because `--check` does not import it."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import suppress
from pathlib import Path


def wakes_up_whole() -> bool:
    """Whether a vLLM that wakes up has what its attention backend made at the start: thresholds, counters, rotations.

    vLLM 0.26 makes all that in the pool of the KV cache, whose content is thrown away; 0.32 and 0.33 in a pool that is
    copied to the host and back, at every level of sleep.

    Returns:
        False of a vLLM that is known to lose it; True also where none is installed, which will answer at its start.
    """
    return _has("device_allocator/sleep_mode_backend.py", '"runtime"')


def serves_text_alone() -> bool:
    """Whether a model whose images attend to themselves attends causally where prompts can hold none.

    vLLM 0.26 asks a backend for the images' way of attention all the same.

    Returns:
        As `wakes_up_whole`.
    """
    return _has("config/model.py", "_supports_multimodal_for_mm_prefix")


def drafts_on_v2() -> bool:
    """Whether the V2 model runner drafts by models, as it does since 0.32.

    Returns:
        As `wakes_up_whole`.
    """
    return _has("v1/worker/gpu/spec_decode/target_dependent_ar/speculator.py", "class TargetDependentARSpeculator")


def splits_pages() -> bool:
    """Whether a page can be split into such with a tail each: specs say since 0.32 how many rows some tokens take.

    Returns:
        As `wakes_up_whole`.
    """
    return _has("v1/kv_cache_interface.py", "tokens_per_state: int | Fraction")


def has_nixl() -> bool:
    """Whether there is the package nixl, which vLLM does without until a connector asks for it."""
    return importlib.util.find_spec("nixl") is not None


def has_torchvision() -> bool:
    """Whether torchvision is there, without which vLLM cannot import some models, even where they read text alone.

    Returns:
        True also where no vLLM is installed.
    """
    return importlib.util.find_spec("vllm") is None or importlib.util.find_spec("torchvision") is not None


@functools.cache
def _has(file: str, words: str) -> bool:
    found = importlib.util.find_spec("vllm")
    for folder in (found and found.submodule_search_locations) or ():
        with suppress(FileNotFoundError):
            return words in Path(folder, file).read_text()
        return False
    return True
