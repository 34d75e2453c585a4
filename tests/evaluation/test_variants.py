from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta.errors import EvaluationError, SettingsError
from vllm_toptheta.evaluation import COMPENSATIONS, expand_variants
from vllm_toptheta.store import ThresholdStore


def test_every_combination_is_there_once(store: ThresholdStore) -> None:
    variants = expand_variants(
        {"a": store, "b": store}, targets=["8", "k:16"], compensations=["none", "sdc"], top_k=True, cap_k=4
    )
    assert len(set(variants)) == len(variants) == 2 * 2 * 2 + 2 * 2
    top_ks = [variant for variant in variants if variant.method == "top_k"]
    assert {(variant.thresholds, variant.target, variant.cap_k) for variant in top_ks} == {
        ("a", "k:8", None),
        ("a", "k:16", None),
    }
    assert [variant.cap_k for variant in variants if variant.method == "top_theta"] == [4] * (2 * 2 * 2)


def test_all_is_what_a_store_can_serve(store: ThresholdStore, model: Any, tmp_path: Path) -> None:
    bare = tiny_store(tmp_path, model, measured=False)
    names = [variant.compensation for variant in expand_variants({"": store}, targets=["8"], compensations=["all"])]
    assert names == [name for name in COMPENSATIONS if not name.startswith(("candidates", "shadow"))]
    names = [variant.compensation for variant in expand_variants({"": bare}, targets=["8"], compensations=["all"])]
    assert names == ["none", "sdc", "sdc+vmc", "exp_threshold", "exp_threshold+vmc"]
    variants = expand_variants({"": store}, targets=["8"], compensations=["all"], top_k=True)
    top_k = [variant.compensation for variant in variants if variant.method == "top_k"]
    assert top_k == ["none", "sdc", "sdc+vmc"]


def test_what_a_name_means(store: ThresholdStore) -> None:
    (variant,) = expand_variants({"": store}, targets=["8"], compensations=["scaled_exp_threshold+vmc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == (
        "exp_threshold",
        "exp_threshold_scale",
        True,
    )
    (variant,) = expand_variants({"": store}, targets=["8"], compensations=["sdc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == ("exact", None, False)


def test_every_mode_has_its_own_compensations(store: ThresholdStore) -> None:
    served = expand_variants({"": store}, targets=["8"], modes=["values", "shadow"])
    assert [(variant.method, variant.compensation) for variant in served] == [
        ("top_theta", "sdc+vmc"),
        ("shadow", "candidates+vmc"),
    ]
    named = ["sdc+vmc", "offline", "shadow+vmc"]
    variants = expand_variants({"": store}, targets=["8"], modes=["values", "shadow"], compensations=named)
    assert [(variant.method, variant.compensation) for variant in variants] == [
        ("top_theta", "sdc+vmc"),
        ("top_theta", "offline"),
        ("shadow", "sdc+vmc"),
        ("shadow", "shadow+vmc"),
    ]
    variants = expand_variants({"": store}, targets=["8"], modes=["shadow"], compensations=["all"])
    assert [variant.compensation for variant in variants] == [
        "none",
        "sdc",
        "sdc+vmc",
        "candidates",
        "candidates+vmc",
        "shadow",
        "shadow+vmc",
    ]
    assert len({variant.name for variant in variants}) == len(variants)
    with pytest.raises(EvaluationError, match="shadow is a compensation of mode shadow. Ask for that mode"):
        expand_variants({"": store}, targets=["8"], compensations=["shadow"])
    with pytest.raises(EvaluationError, match="offline is a compensation of mode values"):
        expand_variants({"": store}, targets=["8"], modes=["shadow"], compensations=["offline"])
    with pytest.raises(EvaluationError, match="mode: unknown mode 'other'. Choose from values, shadow"):
        expand_variants({"": store}, targets=["8"], modes=["other"])


def test_sets_of_dense_layers_are_variants(store: ThresholdStore) -> None:
    variants = expand_variants({"": store}, targets=["8"], top_k=True, dense_layers=[None, (), (0, 2)])
    assert [variant.name for variant in variants] == [
        "top-theta k:8 sdc+vmc",
        "top-theta k:8 sdc+vmc dense none",
        "top-theta k:8 sdc+vmc dense 0,2",
        "top-k k:8 sdc+vmc",
        "top-k k:8 sdc+vmc dense none",
        "top-k k:8 sdc+vmc dense 0,2",
    ]
    with pytest.raises(EvaluationError, match="dense_layers: no layer 4 in a model of 4"):
        expand_variants({"": store}, targets=["8"], dense_layers=[(0, 4)])


def test_unknown_names_are_refused(store: ThresholdStore) -> None:
    with pytest.raises(EvaluationError, match="unknown compensation 'vmc'.*vmc alone equals none"):
        expand_variants({"": store}, targets=["8"], compensations=["vmc"])
    with pytest.raises(SettingsError, match="targets: unknown target 'many'"):
        expand_variants({"": store}, targets=["many"])
