from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, MistralConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.calibration.families import FAMILIES, SHAPE, family_config
from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_config, tiny_model
from vllm_toptheta.calibration.capture import TopKOverride
from vllm_toptheta.calibration.model import hidden_states, load_model, load_tokenizer, overriding_attention
from vllm_toptheta.calibration.override import DenseOverride
from vllm_toptheta.errors import CalibrationError, ModelConfigError
from vllm_toptheta.reference import causal_scores, kth_largest_score


@pytest.mark.parametrize("family", [*FAMILIES, "mistral with a window"])
def test_the_dense_override_is_the_models_own_attention(family: str) -> None:
    config = family_config(family) if family in FAMILIES else MistralConfig(**SHAPE, sliding_window=20)
    config._attn_implementation = "eager"
    model, tokens = tiny_model(config), random_tokens(100)
    expected = hidden_states(model, tokens)
    with overriding_attention(model, DenseOverride()):
        actual = hidden_states(model, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_the_models_attention_comes_back() -> None:
    model, tokens = tiny_model(), random_tokens(50)
    before = hidden_states(model, tokens)
    with pytest.raises(ZeroDivisionError), overriding_attention(model, DenseOverride()):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(hidden_states(model, tokens), before)


def test_layers_with_a_sliding_window_are_not_overridden() -> None:
    config = family_config("gemma2")
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    seen: list[int] = []
    override = TopKOverride(
        target_ks=(8,), sparse_k=8, dense_layers=(), report=lambda layer_idx, kth_scores: seen.append(layer_idx)
    )
    model = tiny_model(config)
    with overriding_attention(model, override):
        hidden_states(model, random_tokens(50))
    assert seen == [1, 3]


def test_reported_scores_are_those_of_the_models_queries_and_keys() -> None:
    """The truth here is made of the projections' outputs, seen by hooks while the model runs its eager attention."""
    config = tiny_config()
    config._attn_implementation = "eager"
    model, tokens = tiny_model(config), random_tokens(90)
    projections: dict[tuple[int, str], Tensor] = {}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, inputs, output, place=(index, name): projections.__setitem__(place, output[0])
        )
        for index, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    hidden_states(model, tokens)
    for handle in handles:
        handle.remove()

    reported: dict[int, Tensor] = {}
    with overriding_attention(
        model, TopKOverride(target_ks=(10,), sparse_k=None, dense_layers=(), report=reported.__setitem__)
    ):
        hidden_states(model, tokens)

    cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(90)[None])
    for layer_idx in range(4):
        query, key = (
            projections[layer_idx, name].detach().view(1, 90, -1, 16).transpose(1, 2) for name in ("q_proj", "k_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores = causal_scores(query[0].transpose(0, 1), key[0].transpose(0, 1), softmax_scale=0.25)
        expected = kth_largest_score(scores, 10).transpose(0, 1)
        torch.testing.assert_close(reported[layer_idx][0], expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(reported[layer_idx][0].isinf(), torch.arange(1, 91).expand(4, -1) < 10)


@pytest.mark.parametrize("sparse_k", [None, 10])
def test_dense_layers_are_reported_and_stay_dense(sparse_k: int | None) -> None:
    model, tokens = tiny_model(), random_tokens(60)
    reported: dict[int, Tensor] = {}
    override = TopKOverride(target_ks=(10,), sparse_k=sparse_k, dense_layers=range(4), report=reported.__setitem__)
    expected = hidden_states(model, tokens)
    with overriding_attention(model, override):
        actual = hidden_states(model, tokens)
    assert sorted(reported) == [0, 1, 2, 3]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_sinks_that_are_not_one_for_each_head_are_refused() -> None:
    function = AttentionInterface()["toptheta_override"]
    module, tensor = SimpleNamespace(layer_idx=3), torch.zeros(1, 2, 3, 4)
    with pytest.raises(CalibrationError, match=r"sinks of layer 3 have the shape \[3\], .* one to each of 2 heads"):
        function(module, tensor, tensor, tensor, None, s_aux=torch.zeros(3))
    with pytest.raises(CalibrationError, match="without padding"):
        function(None, tensor.expand(2, -1, -1, -1), tensor, tensor, None)


def test_chunked_attention_is_refused() -> None:
    config = tiny_config()
    config.layer_types = ["chunked_attention"] * 4
    with (
        pytest.raises(CalibrationError, match="chunked attention"),
        overriding_attention(tiny_model(config), DenseOverride()),
    ):
        pass


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}'
    )
    with pytest.raises(CalibrationError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CalibrationError, match="cannot load"):
        load_model(tmp_path)


def test_a_model_directory_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = save_model_dir(tmp_path / "tiny")
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert len(load_tokenizer(folder)("Grüße")["input_ids"]) == 7


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "no device cuda:99"), ("gpu", "no device 'gpu'"), ("meta", "no device meta")]
)
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: str, message: str) -> None:
    folder = save_model_dir(tmp_path / "tiny")
    with pytest.raises(CalibrationError, match=message) as caught:
        load_model(folder, device=device)
    assert caught.value.field == "device"


def test_spreading_a_model_needs_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model_dir(tmp_path / "tiny")
    monkeypatch.setattr("vllm_toptheta.calibration.model.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"vllm-toptheta\[accelerate\]"):
        load_model(folder, device_map="auto")
