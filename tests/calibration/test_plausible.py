"""A model that does not understand the text is refused, and what it cannot read, before anything is written."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig

from tests.calibration.families import FAMILIES, SHAPE, family_config
from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_config, tiny_model
from vllm_toptheta.calibration import plausible
from vllm_toptheta.calibration.model import hidden_states, load_model, overriding_attention
from vllm_toptheta.calibration.model_input import check_input, max_positions
from vllm_toptheta.calibration.override import DenseOverride
from vllm_toptheta.calibration.plausible import check_understanding, is_new
from vllm_toptheta.errors import CalibrationError

FOLDER = Path("tiny")


@pytest.fixture(autouse=True)
def _as_served(monkeypatch: pytest.MonkeyPatch, random_models_are_accepted: None) -> None:
    monkeypatch.setattr(plausible, "MAX_SHARE_OF_GUESSING", 0.9)


def predicting(model: Any, loss: float, *, behind_begin: float | None = None) -> Any:
    """The model with logits that give the token that follows this loss; another behind its first token."""

    def forward(input_ids: Tensor, **options: Any) -> Any:
        has_begin = int(input_ids[0, 0]) == model.config.bos_token_id
        share = math.exp(-(behind_begin if has_begin and behind_begin is not None else loss))
        logits = torch.full((*input_ids.shape, 256), math.log((1 - share) / 255))
        logits[0, :-1].scatter_(1, input_ids[0, 1:, None], math.log(share))
        return SimpleNamespace(logits=logits)

    model.forward = forward
    return model


def test_a_model_that_guesses_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"does not understand the text: its loss is .* a guess .* has 5\.55"):
        check_understanding(tiny_model(), [random_tokens(200)], model_dir=FOLDER)
    with pytest.raises(CalibrationError, match=r"its loss is 5\.10"):
        check_understanding(predicting(tiny_model(), 5.1), [random_tokens(200)], model_dir=FOLDER)
    check_understanding(predicting(tiny_model(), 4.8), [random_tokens(200)], model_dir=FOLDER)
    # too little to tell
    check_understanding(predicting(tiny_model(), 5.1), [random_tokens(40)], model_dir=FOLDER)


def test_what_was_seen_before_does_not_count() -> None:
    """Tables repeat themselves, and a model goes on with them in tokens of any tokenizer."""
    assert is_new(torch.tensor([5, 3, 5, 5, 4, 3])).tolist() == [True, True, False, False, True, False]
    model = tiny_model(tiny_config(vocab_size=2048))
    tokens = torch.cat([torch.arange(100), torch.arange(100)])

    def forward(input_ids: Tensor, **options: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 2048)
        logits[0, :-1].scatter_(1, input_ids[0, 1:, None], 100.0 * ~is_new(input_ids[0])[1:, None])
        return SimpleNamespace(logits=logits)

    model.forward = forward
    with pytest.raises(CalibrationError, match=r"its loss is 7\.62 nats per new token"):
        check_understanding(model, [tokens], model_dir=FOLDER)


def test_a_tokenizer_without_the_first_token_is_refused() -> None:
    config, tokens = tiny_config(bos_token_id=7), random_tokens(200)
    tokens[0] = 1
    with pytest.raises(CalibrationError, match=r"out the token 7 .* is 3\.00 .* without it 4\.50") as caught:
        check_understanding(predicting(tiny_model(config), 4.5, behind_begin=3.0), [tokens], model_dir=FOLDER)
    assert (caught.value.file, caught.value.field) == (FOLDER, "bos_token")
    # of models that were trained without it, many name one all the same
    check_understanding(predicting(tiny_model(config), 4.5, behind_begin=4.4), [tokens], model_dir=FOLDER)
    for none in (-1, 256):
        check_understanding(predicting(tiny_model(tiny_config(bos_token_id=none)), 4.5), [tokens], model_dir=FOLDER)
    tokens[0] = 7
    check_understanding(predicting(tiny_model(config), 4.5), [tokens], model_dir=FOLDER)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(value)
    with (
        pytest.raises(CalibrationError, match="layer 1 are NaN or infinite"),
        overriding_attention(model, DenseOverride()),
    ):
        hidden_states(model, random_tokens(20))
    with pytest.raises(CalibrationError, match="predictions are NaN or infinite"):
        check_understanding(model, [random_tokens(20)], model_dir=FOLDER)
    model = tiny_model()
    model.lm_head.weight.data.fill_(value)
    with pytest.raises(CalibrationError, match="predictions are NaN or infinite|does not understand"):
        check_understanding(model, [random_tokens(200)], model_dir=FOLDER)


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    for check in (check_input, hidden_states):
        with pytest.raises(CalibrationError, match="makes token 256, and the model knows 256") as caught:
            check(tiny_model(), torch.tensor([3, 256]))
        assert caught.value.field == "vocab_size"


def test_more_tokens_than_positions_are_refused() -> None:
    for check in (check_input, hidden_states):
        with pytest.raises(CalibrationError, match=r"1025 tokens are more than the 1024 positions") as caught:
            check(tiny_model(), random_tokens(1025))
        assert caught.value.field == "length"
    with pytest.raises(CalibrationError, match="positions") as caught:
        check_understanding(tiny_model(), [random_tokens(9), random_tokens(1025)], model_dir=FOLDER, length_field="x")
    assert caught.value.field == "x"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            1024,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_positions_are_counted_as_vllm_counts_them(rope: dict[str, Any], expected: int) -> None:
    config = tiny_config(rope_parameters={"rope_theta": 10000.0, **rope})
    assert max_positions(SimpleNamespace(config=config)) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 20}, "layer_types"),
        ({"sliding_window": 20}, "sliding_window"),
    ],
)
def test_a_window_that_transformers_passes_over_is_refused(fields: dict[str, Any], field: str, tmp_path: Path) -> None:
    folder = save_model_dir(tmp_path / "tiny", tiny_model(tiny_config(**fields)))
    with pytest.raises(CalibrationError, match="without the window of 20 tokens .* and vLLM serves it") as caught:
        load_model(folder)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "config",
    [
        *map(family_config, FAMILIES),
        MistralConfig(**SHAPE, sliding_window=20),
        tiny_config(layer_types=["full_attention"] * 4, sliding_window=20),
        tiny_config(layer_types=["sliding_attention"] * 4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_windows_are_served_as_they_are_computed(config: Any) -> None:
    model = tiny_model(config)
    with overriding_attention(model, DenseOverride()):
        hidden_states(model, random_tokens(30))
