from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from tests.calibration.random_models import random_models_are_accepted
from tests.calibration.tiny_model import save_model_dir, tiny_model, write_text
from tests.evaluation.tiny_store import tiny_store
from tests.one_thread import one_thread
from vllm_toptheta.store import ThresholdStore, load

__all__ = ["one_thread", "random_models_are_accepted"]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model directory `tiny`, its store `org--tiny-model`, and two texts."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_model_dir(folder / "tiny")
    # answers are read as text, so tokens have to become what they were made of
    file = str(folder / "tiny" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.decoder = ByteLevel()
    tokenizer.save(file)
    tiny_store(folder / "org--tiny-model", tiny_model())
    write_text(folder / "prose.txt", 900, seed=1)
    write_text(folder / "code.txt", 900, seed=2)
    return folder


@pytest.fixture(scope="package")
def model() -> Any:
    """The model of `folder`."""
    return tiny_model()


@pytest.fixture(scope="package")
def store(folder: Path) -> ThresholdStore:
    """The store of `folder`."""
    return load(folder / "org--tiny-model")
