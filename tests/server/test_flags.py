"""vLLM's flags: kept word for word, and told apart where two sources set the same one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.server import flags
from vllm_toptheta.server.flags import Flag


def words(parsed: list[Flag]) -> list[str]:
    return [word for flag in parsed for word in flag.words]


@given(st.lists(st.sampled_from(["--port", "8000", "-tp", "2", "-1", "-.5", "--x_y=z", "{}", "-O3", "a"]), max_size=8))
def test_nothing_is_lost(given_words: list[str]) -> None:
    positional, parsed = flags.split(given_words)
    assert positional + words(parsed) == given_words


def test_values_belong_to_the_flag_before_them() -> None:
    positional, parsed = flags.split(["m", "--served_model_name", "a", "b", "--seed", "-1", "--port=1", "--x"])
    assert positional == ["m"]
    assert [(flag.name, flag.value) for flag in parsed] == [
        ("--served-model-name", None),
        ("--seed", "-1"),
        ("--port", "1"),
        ("--x", None),
    ]


def test_a_mapping_becomes_flags() -> None:
    mapping = {
        "port": 8000,
        "enforce_eager": True,
        "enable-prefix-caching": False,
        "served-model-name": ["a", "b"],
        "compilation-config": {"mode": 0},
        "gpu-memory-utilization": 0.5,
    }
    assert words(flags.from_mapping(mapping)) == [
        *("--port", "8000"),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--served-model-name", "a", "b"),
        *("--compilation-config", '{"mode": 0}'),
        *("--gpu-memory-utilization", "0.5"),
    ]


@pytest.mark.parametrize(
    ("lower", "upper", "joined"),
    [
        (["--port", "1", "--seed", "0"], ["--port=2"], ["--seed", "0", "--port=2"]),
        (["--enforce-eager"], ["--no-enforce_eager"], ["--no-enforce_eager"]),
        (["--no-enforce-eager"], ["--enforce-eager"], ["--enforce-eager"]),
    ],
)
def test_the_upper_list_wins(lower: list[str], upper: list[str], joined: list[str]) -> None:
    assert words(flags.overlay(flags.split(lower)[1], flags.split(upper)[1])) == joined


def test_json_is_taken_out() -> None:
    _, parsed = flags.split(["--port", "1", "--additional_config", '{"a": 1}'])
    content, others = flags.take_json(parsed, "--additional-config")
    assert (content, words(others)) == ({"a": 1}, ["--port", "1"])
    assert flags.take_json(others, "--additional-config") == ({}, others)


@pytest.mark.parametrize(
    ("given_words", "message"),
    [
        (["--additional-config", "{"], "--additional-config: not JSON"),
        (["--additional-config"], "--additional-config: not JSON"),
        (["--additional-config", "[]"], r"--additional-config: expected a JSON object, got \[\]"),
        (
            ["--additional-config.toptheta.weight_floor", "1"],
            r"--additional-config\.toptheta\.weight-floor: not supported",
        ),
    ],
)
def test_what_is_no_json_object(given_words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        flags.take_json(flags.split(given_words)[1], "--additional-config")


def test_long_names_may_be_cut_short() -> None:
    parsed = [Flag.of_words(["--kv-cache-d", "fp8"]), Flag.of_words(["--max_model-len=7"])]
    assert flags.value_of(parsed, "--kv-cache-dtype") == "fp8"
    assert flags.integer(parsed, "--max-model-len") == 7
    assert flags.value_of(parsed, "--dtype") is None


def test_a_switch_is_what_it_was_set_to_last() -> None:
    on, off = Flag.of_words(["--enable-sleep-mode"]), Flag.of_words(["--no-enable-sleep-mode"])
    states = {(): False, (on,): True, (on, off): False, (off, on): True}
    assert {given: flags.is_on([*given], "--enable-sleep-mode") for given in states} == states
    by_itself = {given: flags.is_on([*given], "--enable-sleep-mode", by_itself=True) for given in states}
    assert by_itself == states | {(): True}


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ([], {}),
        ([["--a-b", '{"x": 1}']], {"x": 1}),
        ([["--a_b.x_y", "1"], ["--a-b.z.w=text"]], {"x_y": 1, "z": {"w": "text"}}),
        ([["--a-b", '{"x": 1}'], ["--a-b.y", "2"]], {"y": 2}),
        ([["--a-b.x", "1"], ["--a-b.x.y", "2"]], {"x": {"y": 2}}),
        ([["--a-b.x+", "a"], ["--a-b.x+", "b,c"]], {"x": ["a", "b", "c"]}),
        ([["-ab.x", "true"]], {"x": True}),
    ],
)
def test_json_by_dots(words: list[list[str]], content: dict[str, object]) -> None:
    assert flags.json_object([Flag.of_words(group) for group in words], "--a-b", "-ab") == content


@pytest.mark.parametrize("value", ["{", "[1]", ""])
def test_json_that_is_no_object(value: str) -> None:
    with pytest.raises(SettingsError, match="^--a-b: "):
        flags.json_object([Flag.of_words(["--a-b", value])], "--a-b")


def test_a_number_that_is_none() -> None:
    with pytest.raises(SettingsError, match=r"^--a: expected an integer, got x\. Correct it"):
        flags.integer([Flag.of_words(["--a", "x"])], "--a")
