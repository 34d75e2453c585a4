import json
from pathlib import Path

import numpy as np
import pytest

from tests.tools.paper_file import smooth_theta, th_lines, write_lines
from tools.import_paper.__main__ import import_paper, main
from tools.import_paper.lines import PaperFileError
from vllm_toptheta import store
from vllm_toptheta.errors import StoreNotWritable

CONFIG = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_curve_goes_through_the_thresholds(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines(ks=(8, 32)))
    folder = import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", model_id="acme/tiny")
    assert folder == tmp_path / "out" / "acme--tiny"
    loaded = store.load(folder)
    for k in (8, 32):
        for length in (40, 131, 397):
            expected = [[smooth_theta(layer, head, length, k) for head in range(4)] for layer in range(3)]
            np.testing.assert_allclose(loaded.curve(k).threshold(length), expected, atol=1e-4)
    manifest = loaded.manifest
    assert manifest.target_ks == (8, 32)
    assert {(target.min_length, target.max_length) for target in manifest.targets} == {(40, 397)}
    assert manifest.dense_layers == ()
    assert manifest.placement == "pre_softmax"
    assert loaded.calibrated.row_count.sum(axis=1).tolist() == [3 * 52, 3 * 52]


def test_what_the_file_does_not_say_is_not_invented(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    folder = import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", dense_layers=[1])
    loaded = store.load(folder)
    provenance = loaded.manifest.calibration
    assert provenance.num_sequences is provenance.seed is provenance.beta is provenance.top_k_at_calibration is None
    assert [source.name for source in provenance.text] == ["th.txt"]
    assert provenance.max_length == 397
    assert loaded.manifest.dense_layers == (1,)
    assert not loaded.calibrated.score_std.any()


def test_layers_of_another_k_become_dense(model: Path, tmp_path: Path) -> None:
    lines = th_lines(layers=[0], ks=(32,)) + th_lines(layers=[1, 2], ks=(8,))
    folder = import_paper(write_lines(tmp_path / "th.txt", lines), model, placement="pre_softmax", out=tmp_path / "out")
    loaded = store.load(folder)
    assert loaded.manifest.target_ks == (8,)
    assert loaded.manifest.dense_layers == (0,)
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[2, 3], smooth_theta(2, 3, 200, 8), atol=1e-4)


def test_probabilities_make_a_store_for_after_the_softmax(model: Path, tmp_path: Path) -> None:
    def probability(layer: int, head: int, length: int, k: int) -> float:
        return 0.05 * (1 + layer) / length**0.8

    lines = th_lines(theta=probability)
    lines[0] = "L0_H0:40 0.0 3 8"  # what half precision leaves of a small one
    file = write_lines(tmp_path / "th.txt", lines)
    loaded = store.load(import_paper(file, model, placement="post_softmax", out=tmp_path / "post"))
    assert loaded.manifest.placement == "post_softmax"
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[1, 2], probability(1, 2, 200, 8), rtol=1e-3)
    assert (loaded.curve(8).threshold(np.arange(1, 1000)) >= 0).all()


def test_interpolated_lines_do_not_count(model: Path, tmp_path: Path) -> None:
    wrong = th_lines(lengths=range(39, 400, 7), samples=0, theta=lambda *_: 1000.0)
    file = write_lines(tmp_path / "th.txt", th_lines(lengths=range(40, 400, 7)) + wrong)
    loaded = store.load(import_paper(file, model, placement="pre_softmax", out=tmp_path / "out"))
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[1, 1], smooth_theta(1, 1, 200, 8), atol=1e-4)
    only = write_lines(tmp_path / "th_smooth.txt", wrong)
    with pytest.raises(PaperFileError, match="every threshold was interpolated"):
        import_paper(only, model, placement="pre_softmax", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("L0_H0:40 1.0 3", r"line 3: expected 'L<layer>_H<head>:<length> <threshold> <samples> <k>'"),
        ("L0_H0:40 1.0 3 8 9", "line 3: expected"),
        ("L0_H0:40, 1.0, 3, 8", "line 3: expected"),
        ("L0_H0:40 nan 3 8", "line 3: not a finite number"),
        ("L0_H0:40 one 3 8", "line 3: not a finite number"),
        ("L3_H0:40 1.0 3 8", "line 3: layer 3, head 0 in a model of 3 layers and 4 heads"),
        ("L0_H4:40 1.0 3 8", "line 3: layer 0, head 4 in a model"),
        ("L0_H0:8 1.0 3 8", "line 3: k 8 of rows of 8 tokens"),
        ("L0_H0:40 1.0 3 0", "line 3: k 0"),
        ("L0_H0:99999999 1.0 3 8", "line 3: k 8 of rows of 99999999 tokens"),
        ("L0_H1:40 1.0 3 8", "line 3: says again what line 2 says"),
        ("x" * 300, "line 3: longer than 255 characters"),
    ],
)
def test_a_wrong_line_is_named(model: Path, tmp_path: Path, line: str, message: str) -> None:
    file = write_lines(tmp_path / "th.txt", ["L0_H0:41 1.0 3 8", "L0_H1:40 1.0 3 8", line])
    with pytest.raises(PaperFileError, match=message):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"L0_H0:40 \xff 3 8\n"])
def test_a_file_without_lines_is_refused(model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "th.txt").write_bytes(content)
    with pytest.raises(PaperFileError, match="holds no line|not ASCII"):
        import_paper(tmp_path / "th.txt", model, placement="pre_softmax", out=tmp_path / "out")
    with pytest.raises(PaperFileError, match="cannot be read"):
        import_paper(tmp_path, model, placement="pre_softmax", out=tmp_path / "out")


def test_a_file_that_ends_early_is_refused(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines()[:-1])
    with pytest.raises(PaperFileError, match="no threshold for layer 2, head 3, k 8 at length 397"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out")


def test_ks_that_share_no_length_are_refused(model: Path, tmp_path: Path) -> None:
    lines = th_lines(ks=(8,), lengths=range(10, 20)) + th_lines(ks=(32,), lengths=range(40, 50))
    with pytest.raises(PaperFileError, match="share no length"):
        import_paper(write_lines(tmp_path / "th.txt", lines), model, placement="pre_softmax", out=tmp_path / "out")


def test_options_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    with pytest.raises(PaperFileError, match="line .*no probability"):
        import_paper(file, model, placement="post_softmax", out=tmp_path / "out")
    with pytest.raises(PaperFileError, match="dense_layers: no layer 3"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", dense_layers=[3])
    with pytest.raises(PaperFileError, match="^id: String should match"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", model_id="no id")
    with pytest.raises(StoreNotWritable):
        import_paper(file, model, placement="pre_softmax", out=file)


def test_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    out = tmp_path / "out"
    arguments = [file, "--model", model, "--placement", "pre_softmax", "--out", out, "--dense-layers", "0,1"]
    monkeypatch.setattr("sys.argv", ["tools.import_paper", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wrote {out / 'tiny'}\n"
    manifest = store.load(out / "tiny").manifest
    assert manifest.dense_layers == (0, 1)
    assert manifest.calibration.command.startswith("tools.import_paper th.txt --model tiny --placement pre_softmax")
    write_lines(file, ["L0_H0:40 1.0 3 8", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: {file}: line 2: expected " in capsys.readouterr().err
