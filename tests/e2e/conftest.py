"""Models, prompts and thresholds for the engine tests, and the engines that several of them share."""

from __future__ import annotations

import inspect
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from tests import store_factory
from tests.calibration.tiny_model import set_sinks
from tests.e2e.generate import Call, generate
from tests.e2e.server import Server, serving
from tests.e2e.texts import ON_GPU, cut
from tests.shadow_store import make_shadow_store
from vllm_toptheta.cache_folder import cache_folder
from vllm_toptheta.demo_model import MODEL_NAME, demo_model
from vllm_toptheta.errors import ConversionError
from vllm_toptheta.model_folder import is_complete
from vllm_toptheta.store import Architecture


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model."""
    made = cache_folder() / MODEL_NAME
    # `make` installs the weights; an environment at hand may lack them, yet have what was made of them elsewhere
    if is_complete(made):
        return made
    try:
        return demo_model()
    except ConversionError as error:
        if not ON_GPU:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for every test here that needs nothing special; it runs until the last of them has ended."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def text_ids(model: Path) -> list[int]:
    """Python source, tokenised: a long text that every machine has."""
    return AutoTokenizer.from_pretrained(model)(inspect.getsource(tarfile))["input_ids"]


STORED: dict[str, Any] = {"max_length": 4096, "target_ks": (16, 128), "dense_layers": ()}


@pytest.fixture(scope="session")
def low_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thresholds for the demo model that every score reaches, so that the sparse path must equal dense attention."""
    folder = tmp_path_factory.mktemp("low") / "HuggingFaceTB--SmolLM2-135M-Instruct"
    store_factory.make_store(folder, coefficients=[-1e9, 0.0, 0.0], **STORED, **architecture(model))
    return folder


def architecture(model: Path) -> dict[str, Any]:
    """What `store_factory` is told of a model in a folder."""
    return Architecture.from_hf_config(json.loads((model / "config.json").read_text())).model_dump()


def write_model(config: PreTrainedConfig, folder: Path, *, query_scale: float = 1.0) -> Path:
    """Write a randomly initialised model, and return its folder.

    Args:
        config: The model's.
        folder: Where its folder is made.
        query_scale: Factor on normalised queries, by which training makes up for large heads whose scores are not
            divided by the root of their size.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    set_sinks(model)
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data.mul_(query_scale)
    model.save_pretrained(folder / "tiny")
    return folder / "tiny"


def write_tokenizer(words: list[str], folder: Path) -> None:
    """Give a model a tokenizer, of whose vocabulary the last word ends a text."""
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=words[-1]).save_pretrained(folder)


TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # on two kv heads, which two tensor-parallel ranks can share
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # scores and logits spread wide: thresholds matter, and near ties are rare
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, which starts in seconds and reads a prompt in less."""
    return write_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sliding windows in every other layer and capped scores."""
    folder = tmp_path_factory.mktemp("gemma")
    config = Gemma2Config(**TINY, head_dim=64, query_pre_attn_scalar=64, sliding_window=48, attn_logit_softcapping=5.0)
    return write_model(config, folder)


class Subject(NamedTuple):
    """A model whose text must not depend on how an engine splits the work.

    Attributes:
        model: Its folder.
        text: Token ids to cut prompts from.
        thresholds: Where a server of mode `shadow` finds its shadow keys; none where they are shipped.
        floor: The server's weight floor.
        other: Another floor, which requests ask for.
        num_heads: Query heads.
        differing: Share of prompts that have another text at each of the two floors and densely, at least.
        engine: Arguments of every engine.
    """

    model: Path
    text: list[int]
    thresholds: dict[str, str]
    floor: float
    other: float
    num_heads: int
    differing: float
    engine: dict[str, Any]

    def stock(self, calls: list[Call], **engine: Any) -> list[dict[str, Any]]:
        """The answers of vLLM's own backend."""
        return generate(calls, model=str(self.model), engine={**self.engine, **engine})

    def sparse(
        self,
        calls: list[Call],
        environment: dict[str, str] | None = None,
        *,
        floor: float | None = None,
        mode: str = "values",
        copies: bool = False,
        always: bool = True,
        **engine: Any,
    ) -> list[dict[str, Any]]:
        """The answers of ours, in mode `values` at `floor` or the model's, in mode `shadow` at the calibrated one.

        With `copies`, mode `shadow` has copies of keys and values, and the model's floor; `always` scans short steps.
        """
        options: dict[str, Any] = {"mode": mode}
        if copies:
            options |= {"always_shadow": always, "shadow_values": True, "weight_floor": floor or self.floor}
        elif mode == "shadow":
            options |= {"always_shadow": always, **self.thresholds}
        else:
            options["weight_floor"] = floor or self.floor
        return generate(
            calls,
            environment,
            model=str(self.model),
            backend="toptheta",
            options=options,
            engine={**self.engine, **engine},
        )


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The random model; shadow keys know half of the channels."""
    folder = tmp_path_factory.mktemp("tiny")
    make_shadow_store(folder / "acme--tiny", margin=1.0, **STORED, **architecture(tiny_llama))
    chance = random.Random(0)  # noqa: S311 - nothing is secret
    return Subject(
        tiny_llama,
        text=[chance.randrange(TINY["vocab_size"]) for _ in range(4000)],
        thresholds={"thresholds": str(folder)},
        floor=20.0,
        other=5.0,
        num_heads=TINY["num_attention_heads"],
        differing=0.75,
        engine={"skip_tokenizer_init": True},
    )


@pytest.fixture(scope="session")
def demo(model: Path, text_ids: list[int]) -> Subject:
    """The demo model with the shadow keys that the package ships."""
    return Subject(
        model,
        text_ids,
        thresholds={},
        # at 20, a head of layer 0 loses nine tenths of its mass
        floor=4.0,
        other=1.0,
        num_heads=9,
        differing=0.1,
        engine={},
    )


# in float16, a model that has been trained parts from itself far less often than a random one
ON_CPU_SUBJECTS = [
    pytest.param("tiny", marks=pytest.mark.xdist_group("tiny")),
    pytest.param("demo", marks=[pytest.mark.xdist_group("demo invariance"), pytest.mark.nightly]),
]
ON_GPU_SUBJECTS = [pytest.param("demo", marks=pytest.mark.xdist_group("demo invariance"))]


@pytest.fixture(scope="session", params=ON_GPU_SUBJECTS if ON_GPU else ON_CPU_SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """The model that invariance is tested with."""
    found: Subject = request.getfixturevalue(request.param)
    return found


class Stock(NamedTuple):
    """What vLLM's own backend makes of the demo model, for every test that compares with it.

    Attributes:
        calls: By name.
        answers: Likewise.
    """

    calls: dict[str, Call]
    answers: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def stock(model: Path, text_ids: list[int]) -> Stock:
    """Prompts of many lengths, repeated text for n-grams to guess, and prompts for shadow keys."""
    # prompts of float32 on a CPU are most of what these tests take
    number, longest = (20, 3000) if ON_GPU else (10, 1600)
    lengths = [round(16 * (longest / 16) ** (index / (number - 1))) for index in range(number)]
    calls = {
        "lengths": Call(cut(text_ids, lengths), max_tokens=16),
        "repeated": Call([2 * text_ids[start : start + 150] + text_ids[start : start + 60] for start in (0, 400, 900)]),
        "few": Call(cut(text_ids, [40, 300, 700, 1500]), max_tokens=16),
    }
    answers = generate(list(calls.values()), model=str(model), engine={"enable_prefix_caching": False})
    return Stock(calls, dict(zip(calls, answers, strict=True)))
