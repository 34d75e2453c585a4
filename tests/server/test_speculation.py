"""Drafts by models: the check and vLLM's configuration agree on which are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.start import refusal
from tests.server.test_start import LLAMA, build, write
from vllm_toptheta.errors import TopThetaError

SMALL = LLAMA | {"num_hidden_layers": 1}
MIMO = LLAMA | {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str], str]] = {
    # the served model, what drafts, the speculative configuration, flags, and why it is refused
    "a model": (LLAMA, SMALL, {"method": "draft_model"}, [], ""),
    "a model by no method": (LLAMA, SMALL, {}, ["--block-size", "64"], ""),
    "an EAGLE": (LLAMA, SMALL, {"method": "eagle"}, [], ""),
    "an EAGLE 3": (LLAMA, SMALL, {"method": "eagle3"}, [], ""),
    "its own layers": (MIMO, {}, {"method": "mtp"}, [], ""),
    "copies": (LLAMA, SMALL, {"method": "draft_model"}, ["--dtype", "float16"], ""),
    "windows that draft": (
        LLAMA,
        SMALL | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {"method": "draft_model"},
        [],
        "--speculative-config draft_model: sliding_window: no layers of that kind have drafted yet",
    ),
    "beside windows": (
        LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
        SMALL,
        {"method": "eagle"},
        [],
        "--speculative-config eagle: sliding_window: vLLM has models draft on pages of its first kind",
    ),
    "in parallel": (
        LLAMA,
        SMALL | {"pard_token": 3},
        {"method": "draft_model", "parallel_drafting": True},
        [],
        "--speculative-config draft_model parallel_drafting: no model has drafted in that way yet",
    ),
    "by thresholds": (
        LLAMA,
        SMALL,
        {"method": "eagle", "attention_backend": "toptheta"},
        [],
        "--speculative-config eagle attention_backend: layers that draft have no thresholds",
    ),
    "pages of 16": (
        LLAMA,
        SMALL,
        {"method": "eagle"},
        ["--block-size", "16"],
        "--block-size 16: layers that draft have vLLM's own attention",
    ),
    "two ranks": (LLAMA, SMALL, {"method": "eagle"}, ["-tp", "2"], "models have not drafted yet on several ranks"),
    "adapters": (LLAMA, SMALL, {"method": "eagle"}, ["--enable-lora"], "--enable-lora: models have not drafted yet"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_check_agrees_with_the_engine(name: str, tmp_path: Path) -> None:
    target, drafting, fields, flags, words = CASES[name]
    fields = {"num_speculative_tokens": 2, **fields}
    if drafting:
        fields["model"] = str(write(tmp_path / "small", drafting))
    options: dict[str, Any] = {"mode": "shadow"} if name == "copies" else {}
    flags = ["--speculative-config", json.dumps(fields), *flags]
    command = build(write(tmp_path / "tiny", target), flags, **options)
    if not words:
        assert command.check("cpu")
        assert refusal(command) == ""
        return
    with pytest.raises(TopThetaError, match=words) as caught:
        command.check("cpu")
    assert caught.value.remedy
    assert words in refusal(command)


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    flags = ["--spec-method", "eagle", "--spec-model", "./nowhere", "--spec-tokens", "2"]
    with pytest.raises(TopThetaError, match="nowhere: --speculative-config eagle: neither a directory nor a hub id"):
        build(write(tmp_path / "tiny", LLAMA), flags).check("cpu")
