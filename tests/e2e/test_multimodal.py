"""Models that also read images: their text is served; where images attend to themselves, only while there are none."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

from tests.e2e.conftest import TINY
from tests.e2e.generate import Call, generate
from tests.e2e.texts import assert_same_text
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.server.command import ServeCommand
from vllm_toptheta.server.config import ServerConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("multimodal")]

TEXT_ALONE = {"skip_tokenizer_init": True, "limit_mm_per_prompt": {"image": 0}}
REMEDY = """Give --limit-mm-per-prompt '{"image": 0}' to serve its text alone"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Idefics 3, whose images are read like text."""
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config=LlamaConfig(**TINY, pad_token_id=0).to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_id=500,
    )
    folder = tmp_path_factory.mktemp("idefics") / "tiny"
    Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prefixed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but by its config.json an image attends to itself in both directions, like a Gemma 3's."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("prefixed") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_mm_prefix_lm": True}))
    return folder


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    chance = random.Random(0)  # noqa: S311 - nothing is secret
    return [Call([[chance.randrange(490) for _ in range(length)] for length in (300, 40, 700)], max_tokens=24)]


@pytest.fixture(scope="module")
def stock(plain: Path, calls: list[Call]) -> dict[str, Any]:
    (answer,) = generate(calls, model=str(plain), engine=TEXT_ALONE)
    return answer


def check(model: Path, *flags: str) -> str:
    """What `toptheta serve --check` says."""
    return ServeCommand.build([str(model), *flags], {}, ServerConfig()).check()


@pytest.mark.parametrize("kind", ["plain", "prefixed"])
def test_text_is_that_of_the_stock_backend(
    kind: str, calls: list[Call], stock: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(kind)
    assert check(model, "--limit-mm-per-prompt", '{"image": 0}').startswith("thresholds floor:2")
    (every_key,) = generate(
        calls, model=str(model), engine=TEXT_ALONE, backend="toptheta", options={"weight_floor": 1e-300}
    )
    heads = every_key["stats"][0]["layers"]
    assert len(heads) == TINY["num_hidden_layers"] * TINY["num_key_value_heads"]
    assert all(head["rows_read"] == head["rows_cached"] > 0 for head in heads)
    assert_same_text(every_key["outputs"], stock["outputs"])


def test_the_default_is_near_the_stock_backend(plain: Path, calls: list[Call], stock: dict[str, Any]) -> None:
    (ours,) = generate(calls, model=str(plain), engine=TEXT_ALONE, backend="toptheta")
    heads = ours["stats"][0]["layers"]
    assert all(0 < head["rows_read"] < head["rows_cached"] for head in heads)
    pairs = list(zip(ours["outputs"], stock["outputs"], strict=True))
    # the first token is the prompt's, which is dense; the second has lost what thresholds skip
    differences = [abs(one["top2"][1][0] - other["top2"][1][0]) for one, other in pairs]
    assert all(one["token_ids"][0] == other["token_ids"][0] for one, other in pairs)
    assert float(torch.tensor(differences).max()) < 0.1, differences


def test_images_that_attend_to_themselves_are_refused_with_the_way_out(prefixed: Path, calls: list[Call]) -> None:
    with pytest.raises(UnsupportedError, match="tokens of one image see each other") as caught:
        check(prefixed)
    assert caught.value.remedy == REMEDY
    with pytest.raises(RuntimeError, match="UnsupportedError: --limit-mm-per-prompt: tokens of one image") as failed:
        generate(calls, model=str(prefixed), engine={"skip_tokenizer_init": True}, backend="toptheta")
    assert REMEDY in str(failed.value)
