from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta.errors import EvaluationError, SettingsError
from vllm_toptheta.evaluation import COMPENSATIONS, Variant, expand_variants
from vllm_toptheta.evaluation.variants import store_of
from vllm_toptheta.store import ThresholdStore


def expand(stores: Mapping[str, ThresholdStore], **options: Any) -> list[Variant]:
    return expand_variants(stores, **options)


def test_every_combination_is_there_once(store: ThresholdStore) -> None:
    variants = expand(
        {"a": store, "b": store},
        targets=["8", "k:16"],
        compensations=["none", "sdc"],
        top_k=[8, 16],
        cap_k=4,
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
    names = [variant.compensation for variant in expand({"": store}, targets=["8"], compensations=["all"])]
    assert names == [name for name in COMPENSATIONS if not name.startswith(("candidates", "shadow"))]
    names = [variant.compensation for variant in expand({"": bare}, targets=["8"], compensations=["all"])]
    assert names == ["none", "sdc", "sdc+vmc", "exp_threshold", "exp_threshold+vmc"]
    variants = expand({"": store}, targets=["8"], compensations=["all"], top_k=[8])
    top_k = [variant.compensation for variant in variants if variant.method == "top_k"]
    assert top_k == ["none", "sdc", "sdc+vmc"]


def test_what_a_name_means(store: ThresholdStore) -> None:
    (variant,) = expand({"": store}, targets=["8"], compensations=["scaled_exp_threshold+vmc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == (
        "exp_threshold",
        "exp_threshold_scale",
        True,
    )
    (variant,) = expand({"": store}, targets=["8"], compensations=["sdc"])
    assert (variant.denominator, variant.calibrated_term, variant.value_mean) == ("exact", None, False)


def test_every_mode_has_its_own_compensations(store: ThresholdStore) -> None:
    served = expand({"": store}, targets=["8"], modes=["values", "shadow"])
    assert [(variant.method, variant.compensation) for variant in served] == [
        ("top_theta", "sdc+vmc"),
        ("shadow", "candidates+vmc"),
    ]
    named = ["sdc+vmc", "offline", "shadow+vmc"]
    variants = expand({"": store}, targets=["8"], modes=["values", "shadow"], compensations=named)
    assert [(variant.method, variant.compensation) for variant in variants] == [
        ("top_theta", "sdc+vmc"),
        ("top_theta", "offline"),
        ("shadow", "sdc+vmc"),
        ("shadow", "shadow+vmc"),
    ]
    variants = expand({"": store}, targets=["8"], modes=["shadow"], compensations=["all"])
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
        expand({"": store}, targets=["8"], compensations=["shadow"])
    with pytest.raises(EvaluationError, match="offline is a compensation of mode values"):
        expand({"": store}, targets=["8"], modes=["shadow"], compensations=["offline"])
    with pytest.raises(EvaluationError, match="mode: unknown mode 'other'. Choose from values, shadow"):
        expand({"": store}, targets=["8"], modes=["other"])


def test_sets_of_dense_layers_are_variants(store: ThresholdStore) -> None:
    variants = expand({"": store}, targets=["8"], top_k=[8], dense_layers=[None, (), (0, 2)])
    assert [variant.name for variant in variants] == [
        "top-theta k:8 sdc+vmc",
        "top-theta k:8 sdc+vmc dense none",
        "top-theta k:8 sdc+vmc dense 0,2",
        "top-k k:8 sdc+vmc",
        "top-k k:8 sdc+vmc dense none",
        "top-k k:8 sdc+vmc dense 0,2",
    ]


def test_unknown_names_are_refused(store: ThresholdStore) -> None:
    with pytest.raises(EvaluationError, match="unknown compensation 'vmc'.*vmc alone equals none"):
        expand({"": store}, targets=["8"], compensations=["vmc"])
    with pytest.raises(SettingsError, match="targets: unknown target 'many'"):
        expand({"": store}, targets=["many"])


def test_relative_thresholds_need_no_store(store: ThresholdStore) -> None:
    variants = expand({}, targets=["floor:3.0", "floor:0"], top_k=[8], compensations=["all"])
    assert [(variant.method, variant.target, variant.compensation) for variant in variants] == [
        *(
            ("top_theta", f"floor:{floor}", name)
            for floor in (3, 0)
            for name in ("none", "sdc", "sdc+vmc", "exp_threshold", "exp_threshold+vmc")
        ),
        *(("top_k", "k:8", name) for name in ("none", "sdc", "sdc+vmc")),
    ]
    assert {variant.weight_floor for variant in variants} == {3.0, 0.0, None}
    assert all(store_of(variant, {}) is None for variant in variants)
    # beside stores they are there once
    names = [variant.name for variant in expand({"a": store, "b": store}, targets=["8", "floor:1.5"])]
    assert names == ["top-theta floor:1.5 sdc+vmc", "top-theta a k:8 sdc+vmc", "top-theta b k:8 sdc+vmc"]
    assert store_of(Variant(target="k:8", thresholds="a"), {"a": store}) is store


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["floor:3", "k:8"],
            "thresholds: top-theta k:8 needs what was calibrated. Give a store .--thresholds., or ask for",
        ),
        (["floor:-1"], "targets: no weight floor: -1. Give multiples of the average weight, from 0 .dense. to 1000"),
        (["floor:nan"], "targets: no weight floor: nan"),
        (["floor:1e9"], r"targets: no weight floor: 1e\+09"),
        (["floor:three"], "targets: unknown target 'floor:three'. Write floor:2 or k:64"),
        (["floor:"], "targets: unknown target 'floor:'"),
    ],
)
def test_targets_that_cannot_be_without_a_store(targets: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        expand({}, targets=targets)


def test_tiers_are_of_each_floor_and_weight(store: ThresholdStore) -> None:
    variants = expand({"": store}, targets=["floor:2", "8", "floor:3"], heavy=[0.0067, 0], compensations=["none"])
    assert [variant.name for variant in variants if variant.method == "tiers"] == [
        "tiers floor:2 heavy:0.0067 sdc+vmc",
        "tiers floor:2 heavy:0 sdc+vmc",
        "tiers floor:3 heavy:0.0067 sdc+vmc",
        "tiers floor:3 heavy:0 sdc+vmc",
    ]
    assert [variant.method for variant in variants].count("top_theta") == 3
    assert store_of(variants[-1], {"": store}) is None
    with pytest.raises(
        EvaluationError, match=r"heavy: no weight of heavy keys: 1.5. Give multiples of what the anchors"
    ):
        expand({}, targets=["floor:2"], heavy=[0.1, 1.5])
    with pytest.raises(EvaluationError, match="heavy: no weight of heavy keys: nan"):
        expand({}, targets=["floor:2"], heavy=[float("nan")])
    for targets in (["floor:2", "floor:0"], ["8"]):
        with pytest.raises(
            EvaluationError, match="heavy: tiers need a weight floor above 0. Ask for one, such as floor:2"
        ):
            expand({"": store}, targets=targets, heavy=[0.1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy": None}, "heavy is missing: tiers need to know which keys to read exactly"),
        ({"heavy": -0.1}, "greater than or equal to 0"),
        ({"heavy": 1.1}, "less than or equal to 1"),
        ({"target": "floor:0"}, "floor:0 is no target of tiers, they need a weight floor above 0"),
        ({"target": "k:8"}, "k:8 is no target of tiers"),
        ({"compensation": "sdc"}, "sdc is no compensation of tiers, they have sdc.vmc"),
        ({"thresholds": "a"}, "tiers have neither a store nor a cap"),
        ({"cap_k": 8}, "tiers have neither a store nor a cap"),
        ({"method": "top_theta"}, "heavy is of method tiers, not of top_theta"),
    ],
)
def test_tiers_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    fitting = {"method": "tiers", "target": "floor:2", "heavy": 0.01}
    assert Variant(**fitting).name == "tiers floor:2 heavy:0.01 sdc+vmc"
    with pytest.raises(ValidationError, match=message):
        Variant(**{**fitting, **fields})


def test_mode_shadow_has_the_floor_of_its_store(store: ThresholdStore) -> None:
    modes = ["values", "shadow"]
    for targets, names in (
        (["8"], ["top-theta k:8 sdc+vmc", "shadow floor:3 candidates+vmc"]),
        (["floor:3"], ["top-theta floor:3 sdc+vmc", "shadow floor:3 candidates+vmc"]),
    ):
        assert [variant.name for variant in expand({"": store}, targets=targets, modes=modes)] == names
    with pytest.raises(
        EvaluationError, match="targets: the shadow keys of .* were calibrated for floor:3, not for floor:2"
    ):
        expand({"": store}, targets=["floor:2"], modes=["shadow"])
    with pytest.raises(EvaluationError, match="thresholds: shadow floor:2 needs what was calibrated"):
        expand({}, targets=["floor:3"], modes=["shadow"])
    with pytest.raises(ValidationError, match="k:8 is a target of method top_theta"):
        Variant(method="shadow", target="k:8")
    with pytest.raises(ValidationError, match="floor:3 is no number of keys"):
        Variant(method="top_k", target="floor:3")
    with pytest.raises(EvaluationError, match="top_k: no number of keys: 0"):
        expand({}, targets=[], top_k=[0])
