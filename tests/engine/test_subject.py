"""What an engine to measure with refuses before it starts."""

from pathlib import Path

import pytest

from tests.calibration.families import family_config
from tests.calibration.tiny_model import save_model_dir, tiny_model
from vllm_toptheta.engine import EngineSubject
from vllm_toptheta.errors import EvaluationError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("engine_args", "said"),
    [
        ("--no-such-flag 3", "engine_args: unrecognized arguments: --no-such-flag 3. Give flags of vllm serve"),
        ("--tensor-parallel-size two", "engine_args: argument --tensor-parallel-size"),
        ("--max-num-seqs 4", "engine_args: --max-num-seqs is set by this command. Leave it out"),
        ("--attention-backend CPU_ATTN", "engine_args: --attention-backend is set by this command"),
        ("--pipeline-parallel-size 2", "engine_args: --pipeline-parallel-size is not supported here"),
        ("'--dtype", "engine_args: No closing quotation"),
    ],
)
def test_flags_that_cannot_be(model: Path, engine_args: str, said: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        EngineSubject(model, max_length=128, window=16, engine_args=engine_args)
    assert said in str(caught.value)


def test_sequences_that_are_too_long_are_refused_as_a_server_refuses_them(model: Path) -> None:
    with pytest.raises(EvaluationError, match="engine: vLLM cannot start the engine: .*max_model_len"):
        EngineSubject(model, max_length=4096, window=16).setup()


def test_layers_that_keep_states_would_not_be_run(tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny", tiny_model(family_config("falcon_h1")))
    with pytest.raises(EvaluationError, match="model_type falcon_h1: decoding is not evaluated where layers keep"):
        EngineSubject(model, max_length=128, window=16).setup()
