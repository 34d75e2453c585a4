from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta.errors import EvaluationError, SettingsError
from vllm_toptheta.evaluation import COMPENSATIONS, expand_variants
from vllm_toptheta.store import ThresholdStore


def test_every_combination_is_there_once(store: ThresholdStore) -> None:
    variants = expand_variants(
        {"a": store, "b": store}, targets=["8", "k:16", "mass:0.98"], compensations=["none", "sdc"], top_k=True, cap_k=4
    )
    assert len(set(variants)) == len(variants) == 2 * 3 * 2 + 2 * 2
    top_ks = [variant for variant in variants if variant.method == "top_k"]
    assert {(variant.thresholds, variant.target, variant.cap_k) for variant in top_ks} == {
        ("a", "k:8", None),
        ("a", "k:16", None),
    }
    assert all(variant.cap_k == 4 for variant in variants if variant.method == "top_theta")


def test_all_is_what_a_store_can_serve(store: ThresholdStore, model: Any, tmp_path: Path) -> None:
    bare = tiny_store(tmp_path, model, measured=False)
    names = [variant.compensation for variant in expand_variants({"": store}, targets=["8"], compensations=["all"])]
    assert names == list(COMPENSATIONS)
    names = [variant.compensation for variant in expand_variants({"": bare}, targets=["8"], compensations=["all"])]
    assert names == ["none", "sdc", "sdc+vmc", "exp_threshold", "exp_threshold+vmc"]
    top_k = expand_variants({"": store}, targets=["8"], compensations=["all"], top_k=True)[len(COMPENSATIONS) :]
    assert [variant.compensation for variant in top_k] == ["none", "sdc", "sdc+vmc"]


def test_what_a_name_means(store: ThresholdStore) -> None:
    (variant,) = expand_variants({"": store}, targets=["8"], compensations=["scaled_exp_threshold+vmc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == (
        "exp_threshold",
        "exp_threshold_scale",
        True,
    )
    (variant,) = expand_variants({"": store}, targets=["8"], compensations=["sdc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == ("exact", None, False)


def test_unknown_names_are_refused(store: ThresholdStore) -> None:
    with pytest.raises(EvaluationError, match="unknown compensation 'vmc'.*vmc alone equals none"):
        expand_variants({"": store}, targets=["8"], compensations=["vmc"])
    with pytest.raises(SettingsError, match="targets: unknown target 'many'"):
        expand_variants({"": store}, targets=["many"])
