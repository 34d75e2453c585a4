"""Which store belongs to a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store_factory import make_draft
from vllm_toptheta.errors import StoreNotFound
from vllm_toptheta.store import folder_name, list_stores, resolve
from vllm_toptheta.store.resolve import ENVIRONMENT_VARIABLE, ModelName, shipped_directory


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    directory = tmp_path / "stores"
    for name in ("Acme--Tiny-1B", "acme--twin", "other--twin", "plain"):
        (directory / name).mkdir(parents=True)
        (directory / name / "manifest.yaml").touch()
    (directory / "acme--empty").mkdir()
    (directory / ".acme--hidden.tmp").mkdir()
    (directory / ".acme--hidden.tmp" / "manifest.yaml").touch()
    (directory / "file").touch()
    return directory


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Acme/Tiny", ("acme", "tiny")),
        ("gpt2", (None, "gpt2")),
        ("/models/Tiny", (None, "tiny")),
        ("/models/Tiny/", (None, "tiny")),
        ("/models/acme/tiny/../Big", (None, "big")),
        ("./Tiny", (None, "tiny")),
        ("../Tiny", (None, "tiny")),
        ("~/Tiny", (None, "tiny")),
        ("/cache/hub/models--Acme--Tiny/snapshots/0123abcd", ("acme", "tiny")),
        ("/cache/hub/models--gpt2/snapshots/0123abcd", (None, "gpt2")),
    ],
)
def test_name_of_a_model(model: str, name: tuple[str | None, str]) -> None:
    assert ModelName.of_model(model) == name


def test_a_directory_named_like_a_hub_id_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelName.of_model("models/tiny") == (None, "tiny")


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("acme/tiny-1b", "Acme--Tiny-1B"),
        ("/anywhere/TINY-1B", "Acme--Tiny-1B"),
        ("other/twin", "other--twin"),
        ("/hub/models--other--twin/snapshots/1", "other--twin"),
        ("org/plain", "plain"),
        ("/anywhere/plain", "plain"),
    ],
)
def test_matches_by_name(stores: Path, model: str, folder: str) -> None:
    assert resolve(model, thresholds=stores, environment={}) == stores / folder
    assert resolve(model, environment={ENVIRONMENT_VARIABLE: str(stores)}) == stores / folder


@pytest.mark.parametrize(
    "model", ["other/tiny-1b", "acme/tiny", "acme/empty", "acme/hidden.tmp", "", "/", "..", "../../etc/passwd", "a\0b"]
)
def test_a_miss_lists_what_is_there_and_prints_the_command(stores: Path, model: str) -> None:
    with pytest.raises(StoreNotFound, match=r"Acme--Tiny-1B, acme--twin, other--twin, plain") as caught:
        resolve(model, thresholds=stores, environment={})
    assert "toptheta calibrate" in str(caught.value)
    assert "--text FILE... --k 32,64,128,256 --out" in str(caught.value)


def test_two_organisations_are_ambiguous(stores: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"acme--twin or other--twin"):
        resolve("/anywhere/twin", thresholds=stores, environment={})


def test_a_store_named_explicitly_serves_any_name(stores: Path) -> None:
    store = stores / "plain"
    assert resolve("org/other", thresholds=store, environment={}) == store
    assert resolve("org/other", environment={ENVIRONMENT_VARIABLE: str(store)}) == store


def test_explicit_path_comes_before_the_environment(stores: Path) -> None:
    environment = {ENVIRONMENT_VARIABLE: str(stores / "plain")}
    assert resolve("acme/twin", thresholds=stores, environment=environment) == stores / "acme--twin"
    with pytest.raises(StoreNotFound, match="nowhere: thresholds: cannot be listed"):
        resolve("acme/twin", thresholds=stores / "nowhere", environment=environment)
    with pytest.raises(StoreNotFound, match="cannot be listed"):
        resolve("acme/twin", thresholds=stores / "file", environment=environment)


def test_environment_comes_before_the_shipped(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_toptheta.__file__", str(stores.parent / "vllm_toptheta" / "__init__.py"))
    stores.rename(stores.with_name("thresholds"))
    stores = stores.with_name("thresholds")
    assert resolve("acme/twin", environment={}) == stores / "acme--twin"
    assert resolve("acme/twin", environment={ENVIRONMENT_VARIABLE: ""}) == stores / "acme--twin"
    with pytest.raises(StoreNotFound, match=f"nowhere: {ENVIRONMENT_VARIABLE}: cannot be listed"):
        resolve("acme/twin", environment={ENVIRONMENT_VARIABLE: str(stores / "nowhere")})


def test_shipped_directory_lies_in_a_wheel_or_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm_toptheta"
    package.mkdir()
    monkeypatch.setattr("vllm_toptheta.__file__", str(package / "__init__.py"))
    assert shipped_directory() == tmp_path / "thresholds"
    (package / "thresholds").mkdir()
    assert shipped_directory() == package / "thresholds"


def test_list_stores(stores: Path) -> None:
    names = [store.name for store in list_stores(thresholds=stores, environment={})]
    assert names == ["Acme--Tiny-1B", "acme--twin", "other--twin", "plain"]
    assert list_stores(thresholds=stores / "plain", environment={}) == [stores / "plain"]


def test_folder_name_leads_back_to_the_model() -> None:
    model_id = make_draft().model.id
    assert folder_name(model_id) == "acme--tiny"
    assert ModelName.of_folder(folder_name(model_id)) == ModelName.of_model(model_id)
