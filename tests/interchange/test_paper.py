import json
from pathlib import Path

import numpy as np
import pytest

from tests.calibration.tiny_model import save_model_dir, write_text
from tests.interchange.paper_file import smooth_theta, th_lines, write_lines
from vllm_toptheta import store
from vllm_toptheta.errors import InterchangeError, StoreNotWritable
from vllm_toptheta.interchange import import_paper
from vllm_toptheta.reference import Placement

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
    imported = import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", model_id="acme/tiny")
    assert imported.folder == tmp_path / "out" / "acme--tiny"
    loaded = store.load(imported.folder)
    for k in (8, 32):
        for length in (40, 131, 397):
            expected = [[smooth_theta(layer, head, length, k) for head in range(4)] for layer in range(3)]
            np.testing.assert_allclose(loaded.curve(k).threshold(length), expected, atol=1e-4)
    manifest = loaded.manifest
    assert manifest.target_ks == (8, 32)
    assert {(target.min_length, target.max_length) for target in manifest.targets} == {(40, 397)}
    assert manifest.dense_layers == ()
    assert manifest.placement == "pre_softmax"
    assert loaded.row_count.sum(axis=1).tolist() == [3 * 52, 3 * 52]


def test_what_the_file_does_not_say_is_not_invented(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    imported = import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", dense_layers=[1])
    loaded = store.load(imported.folder)
    provenance = loaded.manifest.calibration
    assert provenance.num_sequences is provenance.seed is provenance.beta is provenance.top_k_at_calibration is None
    assert [source.name for source in provenance.text] == ["th.txt"]
    assert provenance.max_length == 397
    assert loaded.manifest.dense_layers == (1,)
    assert not loaded.score_std.any()
    assert any("are not in the file" in note for note in imported.notes)
    assert any("score_std is 0" in note for note in imported.notes)


def test_layers_of_another_k_become_dense(model: Path, tmp_path: Path) -> None:
    lines = th_lines(layers=[0], ks=(32,)) + th_lines(layers=[1, 2], ks=(8,))
    imported = import_paper(
        write_lines(tmp_path / "th.txt", lines), model, placement="pre_softmax", out=tmp_path / "out"
    )
    loaded = store.load(imported.folder)
    assert loaded.manifest.target_ks == (8,)
    assert loaded.manifest.dense_layers == (0,)
    assert any("layers 0 have no thresholds for k 8" in note for note in imported.notes)
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[2, 3], smooth_theta(2, 3, 200, 8), atol=1e-4)


def test_probabilities_make_a_store_for_after_the_softmax(model: Path, tmp_path: Path) -> None:
    def probability(layer: int, head: int, length: int, k: int) -> float:
        return 0.05 * (1 + layer) / length**0.8

    lines = th_lines(theta=probability)
    lines[0] = "L0_H0:40 0.0 3 8"  # what half precision leaves of a small one
    file = write_lines(tmp_path / "th.txt", lines)
    loaded = store.load(import_paper(file, model, placement="post_softmax", out=tmp_path / "post").folder)
    assert loaded.manifest.placement == "post_softmax"
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[1, 2], probability(1, 2, 200, 8), rtol=1e-3)
    assert (loaded.curve(8).threshold(np.arange(1, 1000)) >= 0).all()
    notes = import_paper(file, model, placement="pre_softmax", out=tmp_path / "pre").notes
    assert any("import with post_softmax" in note for note in notes)


def test_interpolated_lines_do_not_count(model: Path, tmp_path: Path) -> None:
    wrong = th_lines(lengths=range(39, 400, 7), samples=0, theta=lambda *_: 1000.0)
    file = write_lines(tmp_path / "th.txt", th_lines(lengths=range(40, 400, 7)) + wrong)
    loaded = store.load(import_paper(file, model, placement="pre_softmax", out=tmp_path / "out").folder)
    np.testing.assert_allclose(loaded.curve(8).threshold(200)[1, 1], smooth_theta(1, 1, 200, 8), atol=1e-4)
    only = write_lines(tmp_path / "th_smooth.txt", wrong)
    with pytest.raises(InterchangeError, match="no threshold for k 8 has a sample"):
        import_paper(only, model, placement="pre_softmax", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("L0_H0:40 1.0 3", r"line 3: expected 'L<layer>_H<head>:<length> <number> <samples> <k>'"),
        ("L0_H0:40 1.0 3 8 9", "line 3: expected"),
        ("L0_H0:40, 1.0, 3, 8", "line 3: expected"),
        ("L0_H0:40 nan 3 8", "line 3: not a finite number"),
        ("L0_H0:40 one 3 8", "line 3: not a finite number"),
        ("L3_H0:40 1.0 3 8", "line 3: layer 3, head 0 in a model of 3 layers and 4 heads"),
        ("L0_H4:40 1.0 3 8", "line 3: layer 0, head 4 in a model"),
        ("L0_H0:8 1.0 3 8", "line 3: k 8 needs rows of more than 8 tokens"),
        ("L0_H0:40 1.0 3 0", "line 3: k 0"),
        ("L0_H0:99999999 1.0 3 8", "line 3: a length of 99999999 tokens"),
        ("L0_H1:40 1.0 3 8", "line 3: says again what line 2 says"),
        ("x" * 300, "line 3: longer than 255 characters"),
    ],
)
def test_a_wrong_line_is_named(model: Path, tmp_path: Path, line: str, message: str) -> None:
    file = write_lines(tmp_path / "th.txt", ["L0_H0:41 1.0 3 8", "L0_H1:40 1.0 3 8", line])
    with pytest.raises(InterchangeError, match=message):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"L0_H0:40 \xff 3 8\n"])
def test_a_file_without_lines_is_refused(model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "th.txt").write_bytes(content)
    with pytest.raises(InterchangeError, match="holds no line|not ASCII"):
        import_paper(tmp_path / "th.txt", model, placement="pre_softmax", out=tmp_path / "out")
    with pytest.raises(InterchangeError, match="cannot be read"):
        import_paper(tmp_path, model, placement="pre_softmax", out=tmp_path / "out")


def test_a_file_that_ends_early_is_refused(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines()[:-1])
    with pytest.raises(InterchangeError, match="no threshold for layer 2, head 3, k 8 at length 397"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out")


def test_ks_that_share_no_length_are_refused(model: Path, tmp_path: Path) -> None:
    lines = th_lines(ks=(8,), lengths=range(10, 20)) + th_lines(ks=(32,), lengths=range(40, 50))
    with pytest.raises(InterchangeError, match="share no length"):
        import_paper(write_lines(tmp_path / "th.txt", lines), model, placement="pre_softmax", out=tmp_path / "out")


def test_options_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    with pytest.raises(InterchangeError, match="line .*no probability"):
        import_paper(file, model, placement="post_softmax", out=tmp_path / "out")
    with pytest.raises(InterchangeError, match="dense_layers: no layer 3"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", dense_layers=[3])
    with pytest.raises(InterchangeError, match="model_id"):
        import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", model_id="no id")
    with pytest.raises(StoreNotWritable):
        import_paper(file, model, placement="pre_softmax", out=file)


def sums_of(lines: list[str]) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in lines]


def test_the_missing_mass_must_belong_to_the_thresholds(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "th.txt", th_lines())
    sums = sums_of(th_lines(theta=lambda *_: 0.5))
    sdc = write_lines(tmp_path / "sdc.txt", sums)
    imported = import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", sdc=sdc)
    assert any("sdc.txt was checked but is kept only beside" in note for note in imported.notes)
    sources = store.load(imported.folder).manifest.calibration.text
    assert [source.name for source in sources] == ["th.txt", "sdc.txt"]
    for line, message in (
        ("L0_H0:41 0.5 3", "line 1: th.txt has no threshold"),
        ("L0_H0:40 -0.5 3", "line 1: a missing mass cannot be negative"),
        ("L0_H0:40 0.5 3 8", "line 1: expected"),
    ):
        write_lines(sdc, [line, *sums[1:]])
        with pytest.raises(InterchangeError, match=message):
            import_paper(file, model, placement="pre_softmax", out=tmp_path / "out", sdc=sdc)
    several = write_lines(tmp_path / "th.txt", th_lines(ks=(8, 16)))
    with pytest.raises(InterchangeError, match="it has no k, but th.txt has k 8, 16"):
        import_paper(several, model, placement="pre_softmax", out=tmp_path / "out", sdc=write_lines(sdc, sums))


@pytest.mark.parametrize("placement", ["pre_softmax", "post_softmax"])
def test_what_the_thresholds_keep_is_measured_on_texts(tmp_path: Path, placement: Placement) -> None:
    model, text = save_model_dir(tmp_path / "tiny"), write_text(tmp_path / "text.txt", 300)
    value = 0.5 if placement == "pre_softmax" else 0.01
    lines = th_lines(layers=[1, 2, 3], lengths=range(40, 130), theta=lambda *_: value)
    file = write_lines(tmp_path / "th.txt", lines)
    sdc = write_lines(tmp_path / "sdc.txt", sums_of([line.replace(f" {value} ", " 0.125 ") for line in lines[:-90]]))
    options = {"placement": placement, "texts": [text], "length": 120, "num_sequences": 2, "dense_layers": [1]}
    plain, with_sdc = (
        store.load(import_paper(file, model, out=tmp_path / name, sdc=sums, **options).folder)
        for name, sums in (("plain", None), ("sdc", sdc))
    )
    for loaded in (plain, with_sdc):
        assert loaded.manifest.measurement == store.Measurement(num_sequences=2)
        assert loaded.manifest.dense_layers == (0, 1)
        curve = loaded.curve(8)
        survivors, lost = curve.expected("survivors_mean", 100), curve.expected("lost_mass_mean", 100)
        assert not survivors[0].any()  # a layer without thresholds
        assert ((survivors[1:] > 0) & (survivors[1:] < 100)).all()
        assert ((lost[1:] > 0) & (lost[1:] < 1)).all()
    measured, given = (loaded.curve(8).expected("offline_sum", 100) for loaded in (plain, with_sdc))
    is_given = given == 0.125
    assert is_given[1:].sum() == 11  # the file has no line of the last head
    assert given[3, 3] == measured[3, 3] > 0

    with pytest.raises(InterchangeError, match="length: sequences of 30 tokens have no row of 40"):
        import_paper(file, model, out=tmp_path / "out", **{**options, "length": 30})
    with pytest.raises(InterchangeError, match="num_sequences"):
        import_paper(file, model, out=tmp_path / "out", **{**options, "num_sequences": 0})
