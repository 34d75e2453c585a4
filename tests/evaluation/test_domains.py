from pathlib import Path

import pytest

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import named_paths


def test_paths_are_grouped_by_name(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "sub/c.py", "x=y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    values = [f"code={tmp_path}/**/*.py", "plain.txt", f"prose={tmp_path}/b.py", "other.txt", f"{tmp_path}/x=y.txt"]
    assert named_paths(values, field="--text", default="text") == {
        "code": [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "sub/c.py"],
        "text": [Path("plain.txt"), Path("other.txt"), tmp_path / "x=y.txt"],
        "prose": [tmp_path / "b.py"],
    }


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--text: no file matches '.*\*\.none'"):
        named_paths([f"code={tmp_path}/*.none"], field="--text", default="text")
