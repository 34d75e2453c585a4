"""Models some of whose layers keep states: texts of random ones are those of vLLM's own backend.

vLLM gives them pages as long as their states, so that few pages are full, and what it caches of prompts goes by states.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.e2e.conftest import TINY, write_model
from tests.e2e.generate import IN_PROCESSES_OF_THEIR_OWN, Call, generate
from tests.e2e.texts import LEAST_COMPARED, ON_GPU, ROUNDING, assert_same_text
from tests.e2e.torchvision import with_torchvision
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.server.command import ServeCommand
from vllm_toptheta.server.config import ServerConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_chunk_size": 64}
DELTA: dict[str, Any] = {
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


class Family(NamedTuple):
    """A kind of hybrid.

    Attributes:
        config: Of a tiny model.
        sparse_layers: Those that attend.
        block_size: Tokens of a page on CPUs, where vLLM makes it as long as the states.
        keeps_prefixes: Whether vLLM can cache on CPUs what prompts begin with.
        dtype: What vLLM serves it in.
        rounding: Nats that two runs may differ by.
    """

    config: PreTrainedConfig
    sparse_layers: set[int]
    block_size: int
    keeps_prefixes: bool = False
    dtype: str = "float32"
    rounding: float = ROUNDING

    @property
    def least_compared(self) -> float:
        """Of tokens in chunks or on ranks, where bfloat16 may part early in one of three prompts."""
        return LEAST_COMPARED if self.dtype == "float32" else 0.5


def _of_delta(config: PreTrainedConfig) -> Family:
    return Family(config, {1, 3}, 640, keeps_prefixes=True, dtype="bfloat16", rounding=0.1)


def _as_released() -> Qwen3_5Config:
    """A decoder within a model that also reads images, with positions of three numbers and states in float32."""
    rope = {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    positions = {**rope, "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    text = Qwen3_5TextConfig(
        **TINY, **DELTA, full_attention_interval=2, mamba_ssm_dtype="float32", rope_parameters=positions
    )
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 64}
    return Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config={**vision, "out_hidden_size": TINY["hidden_size"]},
        **{f"{name}_token_id": 508 + index for index, name in enumerate(("image", "video"))},
        **{f"vision_{name}_token_id": 510 + index for index, name in enumerate(("start", "end"))},
    )


FAMILIES = {
    "granitemoehybrid": Family(
        GraniteMoeHybridConfig(
            **TINY,
            **MAMBA_2,
            layer_types=["mamba", "attention"] * 2,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=256,
            attention_multiplier=0.125,
        ),
        {1, 3},
        640,
    ),
    "falcon_h1": Family(FalconH1Config(**TINY, **MAMBA_2, head_dim=64, mamba_d_ssm=512), {0, 1, 2, 3}, 640),
    "nemotron_h": Family(
        NemotronHConfig(
            **{field: value for field, value in TINY.items() if field != "num_hidden_layers"},
            head_dim=64,
            layers_block_type=["mamba", "attention", "mlp", "mamba", "attention"],
            mamba_num_heads=8,
            mamba_head_dim=64,
            n_groups=1,
            ssm_state_size=256,
            chunk_size=64,
        ),
        {1, 4},
        640,
    ),
    "qwen3_next": _of_delta(Qwen3NextConfig(**TINY, **DELTA, **EXPERTS)),
    "qwen3_5_text": _of_delta(Qwen3_5TextConfig(**TINY, **DELTA)),
    "qwen3_5_moe_text": _of_delta(Qwen3_5MoeTextConfig(**TINY, **DELTA, **EXPERTS)),
    "qwen3_5": _of_delta(_as_released()),
}
if ON_GPU:
    FAMILIES["lfm2"] = Family(
        # vLLM reads the sizes of blocks and convolutions, which transformers 5 knows no more
        Lfm2Config(
            **TINY,
            layer_types=["conv", "full_attention"] * 2,
            conv_dim=256,
            block_dim=256,
            block_auto_adjust_ff_dim=False,
        ),
        {1, 3},
        128,
    )
ALWAYS = FAMILIES if ON_GPU else ("granitemoehybrid",)
MARKED = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in ALWAYS else [pytest.mark.nightly])])
    for name in FAMILIES
]
KEEPS_ALL = {"weight_floor": 1e-300}  # sparse, and no score lies that far below the others
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True, "heavy": 0, **KEEPS_ALL}


def prompts(*lengths: int) -> list[list[int]]:
    """Random tokens, the same ones at every call."""
    chances = [random.Random(length) for length in lengths]  # noqa: S311 - nothing is secret
    return [
        [chance.randrange(TINY["vocab_size"]) for _ in range(length)]
        for chance, length in zip(chances, lengths, strict=True)
    ]


TWICE = [Call(prompts(300, 40, 900, 1500), 24)] * 2


class Model(NamedTuple):
    """A model, and what vLLM's own backend makes of `TWICE` and `growing`."""

    name: str
    family: Family
    folder: Path
    stock: list[dict[str, Any]]
    environment: dict[str, str]

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of every engine."""
        return engine_of(self.family)

    @property
    def type(self) -> str:
        """The decoder's model_type."""
        return str(self.family.config.get_text_config().model_type)


def engine_of(family: Family) -> dict[str, Any]:
    dtype = {} if ON_GPU else {"dtype": family.dtype}
    text_alone = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if hasattr(family.config, "vision_config") else {}
    return {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": ON_GPU or family.keeps_prefixes,
        **dtype,
        **text_alone,
    }


def growing(family: Family) -> Call:
    """Three prompts that nearly fill three pages each, and answers that reach into the fourth."""
    return Call(prompts(*(3 * family.block_size - less for less in (8, 9, 10))), 24)


@pytest.fixture(scope="module", params=MARKED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family = FAMILIES[request.param]
    folder = write_model(family.config, tmp_path_factory.mktemp(request.param))
    needs_torchvision = "qwen3_5" in request.param
    environment = with_torchvision(tmp_path_factory.mktemp("torchvision")) if needs_torchvision else {}
    stock = generate([*TWICE, growing(family)], environment, model=str(folder), engine=engine_of(family))
    assert ON_GPU or stock[0]["block_size"] == family.block_size
    return Model(request.param, family, folder, stock, environment)


def stock_of(model: Model, index: int, environment: dict[str, str] | None = None, **engine: Any) -> dict[str, Any]:
    """What vLLM's own backend answers to a call; in bfloat16 near ties fall otherwise in another engine."""
    if ON_GPU or model.family.dtype == "float32":
        return model.stock[index]
    call = [*TWICE, growing(model.family)][index]
    (answer,) = generate(
        [call],
        {**model.environment, **(environment or {})},
        model=str(model.folder),
        engine={**model.engine, **engine},
    )
    return answer


def ours(
    model: Model,
    options: dict[str, Any],
    calls: list[Call] = TWICE,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    return generate(
        calls,
        {**model.environment, **(environment or {})},
        model=str(model.folder),
        engine={**model.engine, **engine},
        backend="toptheta",
        options=options,
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"weight_floor": 0}, id="dense"),
        pytest.param(KEEPS_ALL, id="values"),
        # of which GPUs have none
        *([] if ON_GPU else [pytest.param(COPIES, id="copies", marks=pytest.mark.nightly)]),
    ],
)
def test_where_every_key_is_kept_the_text_is_the_stock_backends(model: Model, options: dict[str, Any]) -> None:
    family = model.family
    answers = ours(model, options)
    assert (answers[1]["prefix_hits"] > 0) == model.engine["enable_prefix_caching"]
    for answer, stock in zip(answers, model.stock, strict=False):
        assert answer["block_size"] == stock["block_size"]
        heads = answer["stats"][0]["layers"]
        assert {head["layer"] for head in heads} == (family.sparse_layers if options["weight_floor"] else set())
        assert all(head["rows_read"] == head["rows_cached"] > 0 for head in heads)
        assert_same_text(answer["outputs"], stock["outputs"], rounding=family.rounding)


def test_the_default_is_near_the_stock_backend(model: Model) -> None:
    answer, _ = ours(model, {})
    heads = answer["stats"][0]["layers"]
    assert len(heads) == TINY["num_key_value_heads"] * len(model.family.sparse_layers)
    assert all(0 < head["rows_read"] < head["rows_cached"] for head in heads)
    assert all(0 < head["lost_mass_mean"] < 0.5 for head in heads)
    pairs = list(zip(answer["outputs"], model.stock[0]["outputs"], strict=True))
    # the first token is the prompt's, which is dense; the second has lost what thresholds skip
    differences = [abs(one["top2"][1][0] - other["top2"][1][0]) for one, other in pairs]
    assert all(one["token_ids"][0] == other["token_ids"][0] for one, other in pairs)
    assert float(torch.tensor(differences).max()) < 0.1 + model.family.rounding, differences


@pytest.mark.skipif(ON_GPU, reason="the numbers are those of CPUs")
def test_chunks_and_preemption_change_no_text(model: Model) -> None:
    family = model.family
    # each of three sequences takes three pages for keys and values, and then a fourth, and one for its states
    engine = {
        "max_model_len": 4 * family.block_size,
        "max_num_batched_tokens": family.block_size + 16,
        "num_gpu_blocks_override": 14,
        "enable_prefix_caching": False,
    }
    (answer,) = ours(model, KEEPS_ALL, [growing(family)], **engine)
    assert answer["preemptions"] > 0
    stock = stock_of(model, 2, **engine)
    assert_same_text(answer["outputs"], stock["outputs"], family.rounding, family.least_compared)


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_two_ranks_share_the_heads(model: Model) -> None:
    environment = {**IN_PROCESSES_OF_THEIR_OWN, "OMP_NUM_THREADS": "1"}
    answer, _ = ours(model, KEEPS_ALL, environment=environment, tensor_parallel_size=2)
    assert [len(rank["layers"]) for rank in answer["stats"]] == [len(model.family.sparse_layers)] * 2
    stock = stock_of(model, 0, environment, tensor_parallel_size=2)
    assert_same_text(answer["outputs"], stock["outputs"], model.family.rounding, model.family.least_compared)


def test_the_check_agrees(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(device: str, *flags: str) -> str:
        return ServeCommand.build([str(model.folder), *flags], {}, ServerConfig()).check(device)

    if "qwen3_5" in model.name:
        monkeypatch.setattr("vllm_toptheta.server.engine_flags.has_torchvision", lambda: False)
        with pytest.raises(
            UnsupportedError, match=f"model_type {model.type}: vLLM cannot import it without torchvision"
        ):
            check("cpu")
        monkeypatch.setattr("vllm_toptheta.server.engine_flags.has_torchvision", lambda: True)
    if model.name == "lfm2":
        with pytest.raises(UnsupportedError, match="model_type lfm2: on CPUs, vLLM's answers depend on where"):
            check("cpu")
    else:
        assert check("cpu", "--no-enable-prefix-caching").startswith("thresholds floor:2")
        if model.family.keeps_prefixes:
            assert check("cpu").startswith("thresholds floor:2")
        else:
            with pytest.raises(UnsupportedError, match="--enable-prefix-caching: .* Give --no-enable-prefix-caching"):
                check("cpu")
    assert check("gpu").startswith("thresholds floor:2")
