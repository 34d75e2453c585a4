"""Layers that read the keys and values of others, or whose heads differ: texts of random ones are vLLM's own backend's.

The last four of eight layers share, those of a window with layer 2, and the others with layer 3. In a Gemma 4, layers
without a window have larger heads than the others.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Gemma3nTextConfig, Gemma4Config, Gemma4TextConfig, PreTrainedConfig

from tests.e2e.conftest import STORED, TINY, architecture, write_model
from tests.e2e.generate import IN_PROCESSES_OF_THEIR_OWN, Call, generate
from tests.e2e.texts import ON_GPU, ROUNDING, assert_same_text
from tests.e2e.torchvision import with_torchvision
from tests.shadow_store import make_shadow_store
from vllm_toptheta.calibration.model import hidden_states, load_model
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.evaluation.losses import next_token_logits
from vllm_toptheta.server.command import ServeCommand
from vllm_toptheta.server.config import ServerConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SHAPE: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 48,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": TINY["vocab_size"],
    # an embedding of zeros becomes NaN in vLLM, of which GPUs that warm up sample tokens that there are not
    "pad_token_id": None,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gemma3n": Gemma3nTextConfig(
        **SHAPE, head_dim=64, num_kv_shared_layers=4, activation_sparsity_pattern=[0.0] * 8, laurel_rank=16
    ),
    # the answers of one whose first and last matrix are the same would be its prompts' last tokens
    "gemma4": Gemma4TextConfig(
        **SHAPE, head_dim=64, global_head_dim=128, num_kv_shared_layers=4, tie_word_embeddings=False
    ),
    # heads as released, whose values are keys
    "gemma4 without sharing": Gemma4TextConfig(
        **SHAPE,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        tie_word_embeddings=False,
    ),
}
MARKED = [
    pytest.param(
        name,
        marks=[pytest.mark.xdist_group(name), *([] if ON_GPU or name == "gemma3n" else [pytest.mark.nightly])],
    )
    # of heads of 512 GPUs have none
    for name in (list(FAMILIES)[:2] if ON_GPU else FAMILIES)
]
SPARSE_LAYERS = {1, 3, 5, 7}
ENGINE: dict[str, Any] = {"skip_tokenizer_init": True}
if ON_GPU:  # as thresholds' layers have it; by itself vLLM takes the fourth for a Gemma 4
    ENGINE["attention_config"] = {"flash_attn_version": 3}
ROUNDED = 0.1 if ON_GPU else ROUNDING
KEEPS_ALL = {"weight_floor": 1e-300}  # sparse, and no score lies that far below the others
# nothing is weighed by a copy
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True, "heavy": 0, **KEEPS_ALL}


def prompts(*lengths: int) -> list[list[int]]:
    """Random tokens, the same ones at every call."""
    chances = [random.Random(length) for length in lengths]  # noqa: S311 - nothing is secret
    return [
        [chance.randrange(TINY["vocab_size"]) for _ in range(length)]
        for chance, length in zip(chances, lengths, strict=True)
    ]


# the second one stands behind cached prefixes; the third one's answers reach into a page that no prompt has filled
CALLS = [*[Call(prompts(300, 40, 900, 1500), 24)] * 2, Call(prompts(375, 374, 376), 24)]


class Model(NamedTuple):
    """A model, and what vLLM's own backend answers to `CALLS`."""

    name: str
    folder: Path
    stock: list[dict[str, Any]]

    @property
    def shares(self) -> bool:
        """Whether layers read the keys and values of others."""
        return "without" not in self.name

    @property
    def num_kv_heads(self) -> int:
        """Of layers without a window."""
        return int(architecture(self.folder)["num_kv_heads"])


@pytest.fixture(scope="module", params=MARKED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config, place = FAMILIES[request.param], tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    folder = write_model(config, place, query_scale=0.125 if "without" in request.param else 1.0)
    stock = generate(CALLS, model=str(folder), engine=ENGINE)
    assert all(math.isfinite(best) for answer in stock for output in answer["outputs"] for best, _ in output["top2"])
    return Model(request.param, folder, stock)


def ours(
    model: Model,
    options: dict[str, Any],
    calls: list[Call] = CALLS,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    return generate(
        calls,
        environment,
        model=str(model.folder),
        engine={**ENGINE, **engine},
        backend="toptheta",
        options=options,
    )


@pytest.fixture(scope="module")
def every_key(model: Model) -> list[dict[str, Any]]:
    """The answers in mode `values` where every score reaches the thresholds."""
    return ours(model, KEEPS_ALL)


def first_tokens(output: dict[str, Any], number: int) -> dict[str, Any]:
    """The beginning of an output."""
    return {name: output[name][:number] for name in ("token_ids", "top2")}


def assert_as_stock(answers: list[dict[str, Any]], stock: list[dict[str, Any]], sparse_layers: set[int]) -> None:
    for answer, other in zip(answers, stock, strict=True):
        heads = answer["stats"][0]["layers"]
        assert {head["layer"] for head in heads} == sparse_layers
        assert all(head["rows_read"] == head["rows_cached"] > 0 for head in heads)
        assert_same_text(answer["outputs"], other["outputs"], rounding=ROUNDED)


@pytest.mark.parametrize(
    ("options", "sparse_layers"),
    [
        pytest.param({"weight_floor": 0}, set(), id="dense"),
        pytest.param(KEEPS_ALL, SPARSE_LAYERS, id="values"),
        pytest.param(COPIES, SPARSE_LAYERS, id="copies", marks=pytest.mark.nightly),
        # nobody but layers that share writes the tails of layer 3
        pytest.param(
            {**COPIES, "dense_layers": [3]},
            SPARSE_LAYERS - {3},
            id="copies of a dense layer",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_where_every_key_is_kept_the_text_is_the_stock_backends(
    model: Model, every_key: list[dict[str, Any]], options: dict[str, Any], sparse_layers: set[int]
) -> None:
    answers = every_key if options is KEEPS_ALL else ours(model, options)
    assert answers[1]["prefix_hits"] > 0
    assert_as_stock(answers, model.stock, sparse_layers)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="values"),
        pytest.param({"mode": "shadow", "always_shadow": True}, id="copies", marks=pytest.mark.nightly),
    ],
)
def test_the_default_is_near_the_stock_backend(model: Model, options: dict[str, Any]) -> None:
    for answer, stock in zip(ours(model, options), model.stock, strict=True):
        heads = answer["stats"][0]["layers"]
        assert {head["layer"] for head in heads} == SPARSE_LAYERS
        assert len(heads) == model.num_kv_heads * len(SPARSE_LAYERS)
        assert all(0 < head["rows_read"] < head["rows_cached"] for head in heads)
        assert all(0 < head["lost_mass_mean"] < 0.5 for head in heads)
        # the first token is the prompt's, which is dense
        runs = (answer["outputs"], stock["outputs"])
        assert_same_text(*([first_tokens(output, 1) for output in run] for run in runs), rounding=ROUNDED)
        pairs = [pair for pair in zip(*runs, strict=True) if pair[0]["token_ids"][0] == pair[1]["token_ids"][0]]
        # the second has lost what thresholds skip
        differences = [abs(one["top2"][1][0] - other["top2"][1][0]) for one, other in pairs]
        assert float(torch.tensor(differences).max()) < 0.1 + ROUNDED, differences


def test_the_text_is_that_of_transformers(model: Model, every_key: list[dict[str, Any]]) -> None:
    if ON_GPU:
        pytest.skip("float16 parts too early to compare whole texts of a random model")
    reference = load_model(model.folder)
    reference.set_attn_implementation("eager")
    for prompt, output in zip(CALLS[0].prompts, every_key[0]["outputs"], strict=True):
        token_ids = torch.tensor(prompt + output["token_ids"])
        states = hidden_states(reference, token_ids)[len(prompt) - 1 : -1]
        with torch.inference_mode():
            best = next_token_logits(reference, states).float().log_softmax(-1).topk(2)
        top2 = best.values.tolist()
        assert_same_text([output], [{"token_ids": best.indices[:, 0].tolist(), "top2": top2}])
        assert abs(top2[0][0] - output["top2"][0][0]) < ROUNDED


@pytest.mark.skipif(ON_GPU, reason="the numbers are those of CPUs")
@pytest.mark.nightly
def test_chunks_and_preemption_change_no_text(model: Model) -> None:
    (answer,) = ours(
        model,
        COPIES,
        CALLS[2:],
        max_model_len=512,
        max_num_batched_tokens=144,
        num_gpu_blocks_override=17,
        enable_prefix_caching=False,
    )
    assert answer["preemptions"] > 0
    assert_as_stock([answer], model.stock[2:], SPARSE_LAYERS)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "engine"),
    [
        (
            {**KEEPS_ALL},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        ),
        ({"lossless": True}, {}),
    ],
    ids=["ngram", "lossless"],
)
def test_speculation_changes_no_text(model: Model, options: dict[str, Any], engine: dict[str, Any]) -> None:
    if ON_GPU and "lossless" in options:
        with pytest.raises(RuntimeError, match="UnsupportedError: .*on GPUs, layers that share"):
            ours(model, options)
        return
    if engine and model.name != "gemma3n":
        pytest.skip("no text of this model repeats itself, so that n-grams guess nothing")
    for answer, stock in zip(ours(model, options, **engine), model.stock, strict=True):
        assert answer["accepted"] > 0
        assert_same_text(answer["outputs"], stock["outputs"], rounding=ROUNDED)


def test_the_check_agrees(model: Model, tmp_path: Path) -> None:
    def check(device: str, *flags: str, **options: Any) -> str:
        return ServeCommand.build([str(model.folder), *flags], options, ServerConfig()).check(device)

    assert check("cpu").startswith("thresholds floor:2")
    with pytest.raises(UnsupportedError, match="--kv-sharing-fast-prefill: steps of layers that leave out"):
        check("cpu", "--kv-sharing-fast-prefill")
    if model.shares:
        with pytest.raises(UnsupportedError, match="--tensor-parallel-size 2: layers that share"):
            check("cpu", "--tensor-parallel-size", "2")
        make_shadow_store(tmp_path / "acme--tiny", margin=1.0, **STORED, **architecture(model.folder))
        with pytest.raises(UnsupportedError, match="num_kv_shared_layers 4: layers that share keys have calibrated"):
            check("cpu", mode="shadow", thresholds=str(tmp_path))
    if model.name != "gemma3n":
        with pytest.raises(UnsupportedError, match="--hf-overrides global_head_dim: vLLM has read by then"):
            check("cpu", "--hf-overrides", '{"global_head_dim": 128}')
    if model.shares:
        assert check("gpu").startswith("thresholds floor:2")
    else:
        with pytest.raises(UnsupportedError, match="head_dim 512: there are no GPU kernels for heads of 512"):
            check("gpu")


@pytest.mark.parametrize("refused", ["fast prefill", "another kind"])
def test_what_an_engine_refuses(model: Model, refused: str) -> None:
    engine: dict[str, Any] = {"kv_sharing_fast_prefill": True}
    words = "--kv-sharing-fast-prefill: steps of layers that leave out rows"
    if refused == "another kind":
        number, why = 7, "no layer of full_attention is left whose keys and values others could read"
        if model.name == "gemma3n":
            number, why = 3, "vLLM has a layer of sliding_attention share with layer 3, which is no such layer"
        engine, words = {"hf_overrides": {"num_kv_shared_layers": number}}, f"num_kv_shared_layers {number}: {why}"
    with pytest.raises(RuntimeError, match=f"UnsupportedError: .*{words}"):
        ours(model, {}, **engine)


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_two_ranks_share_the_heads(model: Model) -> None:
    if model.shares:
        pytest.skip("layers that share are refused on several ranks")
    environment = {**IN_PROCESSES_OF_THEIR_OWN, "OMP_NUM_THREADS": "1"}
    answer, *_ = ours(model, KEEPS_ALL, environment=environment, tensor_parallel_size=2)
    assert [len(rank["layers"]) for rank in answer["stats"]] == [len(SPARSE_LAYERS)] * 2
    assert_same_text(answer["outputs"], model.stock[0]["outputs"], rounding=ROUNDED)


@pytest.mark.nightly
@pytest.mark.xdist_group("gemma4")
def test_a_released_gemma_4_serves_its_text_alone(tmp_path: Path) -> None:
    """A decoder within a model that also reads images, which attend to themselves."""
    # transformers puts padding where images are
    others = {"use_bidirectional_attention": "vision", "tie_word_embeddings": True, "pad_token_id": 0}
    text = FAMILIES["gemma4"].to_dict() | others
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    vision = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {f"{name}_token_id": 500 + index for index, name in enumerate(("image", "video", "audio"))}
    folder = write_model(Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens), tmp_path)
    environment = with_torchvision(tmp_path / "torchvision")
    engine = {**ENGINE, "limit_mm_per_prompt": {"image": 0, "video": 0}}
    asked: dict[str, Any] = {"model": str(folder), "engine": engine}
    stock = generate(CALLS[:2], environment, **asked)
    answers = generate(CALLS[:2], environment, **asked, backend="toptheta", options=KEEPS_ALL)
    assert_as_stock(answers, stock, SPARSE_LAYERS)
    assert load_model(folder).config.get_text_config().num_hidden_layers == SHAPE["num_hidden_layers"]
    command = ServeCommand.build([str(folder)], {}, ServerConfig())
    remedy = """Give --limit-mm-per-prompt '{"image": 0, "video": 0}' to serve its text alone"""
    with pytest.raises(UnsupportedError, match="tokens of one image see each other") as caught:
        command.check("cpu")
    assert caught.value.remedy == remedy
    limits = ["--limit-mm-per-prompt", json.dumps(engine["limit_mm_per_prompt"])]
    assert ServeCommand.build([str(folder), *limits], {}, ServerConfig()).check("cpu").startswith("thresholds floor:2")
