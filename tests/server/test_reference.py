"""docs/configuration.md is what the models say."""

from __future__ import annotations

from pathlib import Path

import vllm_toptheta
from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.server.reference import reference
from vllm_toptheta.settings import Settings

FILE = Path(vllm_toptheta.__file__).parents[1] / "docs" / "configuration.md"


def test_the_committed_file_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), "run: toptheta config docs > docs/configuration.md"


def test_every_field_is_described() -> None:
    text = reference()
    for name, field in {**Settings.model_fields, **ServerConfig.model_fields}.items():
        assert f"| `{name}` |" in text
        assert field.description
        assert field.description in text


def test_the_example_is_valid(tmp_path: Path) -> None:
    example = reference().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "serve.yaml").write_text(example)
    config = ServerConfig.load(tmp_path / "serve.yaml")
    assert config.options == {"weight_floor": 2, "min_context": 1024}
    assert config.vllm["enable-prefix-caching"] is False
