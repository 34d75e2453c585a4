"""What `toptheta serve` makes of its arguments: the plain command, or one line that says what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vllm_toptheta import cli
from vllm_toptheta.errors import SettingsError, UnsupportedError
from vllm_toptheta.server import command
from vllm_toptheta.server.command import ServeCommand
from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.store import Serving


def build(*words: str, config: dict[str, Any] | None = None, **options: Any) -> ServeCommand:
    return ServeCommand.build(list(words), options, ServerConfig.model_validate(config or {}))


def words(built: ServeCommand) -> list[str]:
    return [word for flag in built.flags for word in flag.words]


def test_the_backend_is_selected_and_flags_are_kept() -> None:
    built = build("acme/tiny", "--port", "8123", "-tp", "2")
    assert (built.model, words(built)) == (
        "acme/tiny",
        ["--attention-backend", "toptheta", "--port", "8123", "-tp", "2"],
    )


def test_the_command_line_wins_over_the_file_and_its_options_over_its_json() -> None:
    config = {
        "model": "acme/file",
        "weight_floor": 8.0,
        "min_context": 9,
        "compensation": "none",
        "vllm": {"port": 1, "seed": 2, "additional-config": {"other": 1, "toptheta": {"min_context": 7}}},
    }
    flag = json.dumps({"toptheta": {"weight_floor": 16, "compensation": "sdc"}, "another": 2})
    built = build("acme/tiny", "--port", "3", "--additional-config", flag, config=config, weight_floor=32)
    *front, name, additional = words(built)
    assert (built.model, front) == (
        "acme/tiny",
        ["--attention-backend", "toptheta", "--seed", "2", "--port", "3"],
    )
    assert name == "--additional-config"
    assert json.loads(additional) == {
        "other": 1,
        "another": 2,
        "toptheta": {"weight_floor": 32, "min_context": 9, "compensation": "sdc"},
    }


def test_only_what_somebody_set_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_WEIGHT_FLOOR", "16")
    built = build("acme/tiny", dense_layers="0,2", thresholds="stores")
    assert built.options == {"dense_layers": [0, 2], "thresholds": "stores"}


def test_what_flags_say_of_the_serving_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Serving] = []
    monkeypatch.setattr(command, "preflight", lambda _settings, _model, flags, **_: told.append(flags.serving))
    build("acme/tiny", "--quantization", "fp8", "--kv-cache-dtype=fp8_e5m2").check()
    build("acme/tiny", "-q", "awq").check()
    build("acme/tiny", "--dtype", "half").check()
    build("acme/tiny", "--dtype=bfloat16").check()
    build("acme/tiny", "--dtype", "auto").check()
    build("acme/tiny", "--max-model-len", "32k", "--kv-cache-d", "bfloat16").check()
    build("acme/tiny").check()
    assert told == [
        Serving(quantization="fp8", cache_dtype="fp8_e5m2"),
        Serving(quantization="awq"),
        Serving(dtype="float16"),
        Serving(dtype="bfloat16"),
        Serving(),
        Serving(max_length=32_000, cache_dtype="bfloat16"),
        Serving(),
    ]


@pytest.mark.parametrize(
    ("flags", "selected"),
    [
        (["--attention-backend", "TopTheta"], []),
        (["--attention-config.backend_per_kind.full_attention", "toptheta"], []),
        (["--attention-config", '{"backend": "toptheta"}'], []),
        (["--attention-config.flash_attn_version", "3"], ["--attention-backend", "toptheta"]),
    ],
)
def test_a_backend_that_is_selected_already(flags: list[str], selected: list[str]) -> None:
    assert words(build("acme/tiny", *flags)) == [*selected, *flags]


@pytest.mark.parametrize("flags", [["--attention-backend", "FLASH_ATTN"], ["-ac.backend=triton_attn"]])
def test_another_backend(flags: list[str]) -> None:
    with pytest.raises(SettingsError, match="selects another backend"):
        build("acme/tiny", *flags)


@pytest.mark.parametrize("arguments", [[], ["--port", "1", "acme/tiny"], ["a/b", "c/d"], ["a/b", "--model", "c/d"]])
def test_one_model_first(arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match="^MODEL: expected one model, before all flags"):
        build(*arguments)


@pytest.mark.parametrize("name", ["model", "config"])
def test_flags_that_a_file_cannot_set(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^vllm.{name}: cannot be set here"):
        build(config={"model": "a/b", "vllm": {name: "x"}})


@pytest.mark.parametrize(
    ("flags", "options", "field"),
    [
        ([], {"weight_floor": -1}, "--weight-floor"),
        ([], {"compensation": "vmc"}, "--compensation"),
        ([], {"mode": "keys"}, "--mode"),
        (["--additional-config", '{"toptheta": {"target": 1}}'], {}, r"additional_config\.toptheta\.target"),
        (["--additional-config", '{"toptheta": 1}'], {}, r"additional_config\.toptheta: expected a mapping"),
    ],
)
def test_options_that_do_not_exist_or_fit(flags: list[str], options: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError, match=f"^{field}"):
        build("acme/tiny", *flags, **options)


def test_the_text_can_be_typed_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    text = build("acme/tiny", "--api-key", "secret", "--hf_token=secret", "--chat-template", "it's").text()
    assert "secret" not in text
    variable, program, *rest = shlex.split(text)
    assert (variable, Path(program).name) == ("VLLM_PLUGINS=mine,toptheta", "vllm")
    assert rest == [
        *("serve", "acme/tiny", "--attention-backend", "toptheta"),
        *("--api-key", "***", "--hf-token", "***", "--chat-template", "it's"),
    ]


@pytest.mark.parametrize(
    ("named", "plugins"), [("", "toptheta"), ("toptheta", "toptheta"), ("z,toptheta,a", "a,z,toptheta")]
)
def test_plugins_that_are_named_stay(named: str, plugins: str) -> None:
    assert command._plugins({"VLLM_PLUGINS": named}) == plugins


def test_plugins_that_vllm_would_load_anyway_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm.general_plugins": ["toptheta", "some_models", "routes_too"],
        "vllm.platform_plugins": ["a_device"],
        "vllm.endpoint_plugins": ["toptheta", "routes_too"],
    }

    def entry_points(*, group: str) -> metadata.EntryPoints:
        return metadata.EntryPoints(metadata.EntryPoint(name, "x", group) for name in installed.get(group, []))

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert command._plugins({}) == "a_device,some_models,toptheta"


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this process would have become: program, arguments and environment."""
    calls: list[Any] = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        calls.append((program, arguments, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    return calls


def test_without_a_distribution_called_vllm(monkeypatch: pytest.MonkeyPatch, replaced: list[Any]) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit):
        build("acme/tiny", "--port", "1").become()
    ((program, arguments, _),) = replaced
    assert program == arguments[0] == sys.executable
    assert arguments[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "acme/tiny"]
    assert arguments[-2:] == ["--port", "1"]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"vLLM is not installed.*extra cpu or gpu"):
        build("acme/tiny").text()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["toptheta", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_serve_prints_the_command_and_becomes_it(
    model: Path,
    thresholds: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    replaced: list[Any],
) -> None:
    assert run(monkeypatch, model, "--target", "k:16", "--thresholds", thresholds, "--api-key", "secret", "-tp", 2) == 0
    printed = capsys.readouterr()
    ((program, arguments, environment),) = replaced
    assert Path(program).name == "vllm"
    assert environment["VLLM_PLUGINS"].split(",")[-1] == "toptheta"
    assert arguments[1:] == [
        *("serve", str(model), "--attention-backend", "toptheta", "--api-key", "secret", "-tp", "2"),
        *("--additional-config", json.dumps({"toptheta": {"target": "k:16", "thresholds": str(thresholds)}})),
    ]
    (line,) = printed.out.splitlines()
    assert shlex.split(line)[2:] == [word.replace("secret", "***") for word in arguments[1:]]
    assert printed.err.startswith("checked: thresholds of acme/tiny")


@pytest.mark.parametrize(("target", "code"), [("k:16", 0), ("k:64", 2)])
def test_check(
    model: Path,
    thresholds: Path,
    target: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    replaced: list[Any],
) -> None:
    file = model.parent / "serve.yaml"
    file.write_text(f"model: tiny\nthresholds: {thresholds}\ntarget: {target}\n")
    assert run(monkeypatch, "--config", file, "--check", "--port", 1) == code
    printed = capsys.readouterr()
    assert len((printed.out + printed.err).splitlines()) == 1
    assert printed.out.startswith("checked: ") if code == 0 else printed.err.startswith("error: ")
    assert replaced == []


def test_the_check_imports_nothing_heavy(model: Path, thresholds: Path) -> None:
    script = (
        "import sys\n"
        "from vllm_toptheta.cli import main\n"
        f"sys.argv = ['toptheta', 'serve', {str(model)!r}, '--thresholds', {str(thresholds)!r}]\n"
        "sys.argv += ['--target', 'k:16', '--check']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'triton'} & sys.modules.keys()))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
