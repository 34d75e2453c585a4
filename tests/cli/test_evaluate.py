"""The commands `toptheta eval ...`, as a user types them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Run, runner
from tests.cli.test_main import imported
from tests.evaluation.fake_server import FakeServer


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `toptheta eval` with these arguments; returns exit code, stdout and stderr."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return runner(monkeypatch, capsys, "eval")


def on(folder: Path, command: str, *arguments: object) -> tuple[object, ...]:
    return (command, folder / "tiny", "--thresholds", folder / "org--tiny-model", "--device", "cpu", *arguments)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_help_imports_nothing_heavy() -> None:
    assert imported("eval", "--help") == ""
    assert imported("eval", "perplexity", "--help") == ""


def test_perplexity(run: Run, folder: Path, tmp_path: Path) -> None:
    texts = ("--text", f"prose={folder}/pro*.txt", "--text", f"code={folder}/code.txt")
    sizes = ("--k", "8,16", "--sequences", 2, "--length", 80)
    modes = ("--compensations", "none,sdc+vmc", "--top-k", "8,16", "--human-eval", "--limit", 2)
    outputs = ("--json", tmp_path / "report.json", "--plots", tmp_path / "plots")
    code, out, err = run(*on(folder, "perplexity", *texts, *sizes, *modes, *outputs))
    assert code == 0, err
    report = read(tmp_path / "report.json")
    assert {domain["domain"] for domain in report["domains"]} == {"prose", "code", "human-eval"}
    assert all(len(domain["comparisons"]) == 8 for domain in report["domains"])
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        "trade-off-prose.png",
        "trade-off-code.png",
        "trade-off-human-eval.png",
    }
    assert [line.split(" on ")[1].split(":")[0] for line in out.splitlines() if " on " in line] == [
        domain["domain"] for domain in report["domains"]
    ]


def test_perplexity_by_mode_and_dense_layers(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ("--k", 8, "--sequences", 1, "--length", 200, "--json", tmp_path / "report.json")
    modes = ("--mode", "values,shadow", "--dense-layers", "store", "--dense-layers", "none", "--dense-layers", "2,0")
    code, out, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", *options, *modes))
    assert code == 0, err
    variants = [comparison["variant"] for comparison in read(tmp_path / "report.json")["domains"][0]["comparisons"]]
    assert {(variant["method"], variant["compensation"], str(variant["dense_layers"])) for variant in variants} == {
        (method, compensation, layers)
        for method, compensation in (("top_theta", "sdc+vmc"), ("shadow", "candidates+vmc"))
        for layers in ("None", "[]", "[0, 2]")
    }
    assert "truly" in out  # headings are broken into lines
    assert "k:8 dense 0,2" in out
    code, _, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", *options, "--dense-layers", "first"))
    assert code == 2
    assert "--dense-layers: not whole numbers: 'first'" in err
    code, _, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", *options, "--dense-layers", "0,4"))
    assert code == 2
    assert "--dense-layers: no layer 4 in a model of 4" in err


@pytest.mark.parametrize(("phase", "predicted"), [("both", 79), ("decode", 40), ("prefill", 40)])
def test_perplexity_by_phase(run: Run, folder: Path, tmp_path: Path, phase: str, predicted: int) -> None:
    options = ("--k", 8, "--sequences", 1, "--length", 80, "--phase", phase, "--json", tmp_path / "report.json")
    code, _, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", *options))
    assert code == 0, err
    report = read(tmp_path / "report.json")
    assert (report["phase"], report["domains"][0]["num_predicted_tokens"]) == (phase, predicted)
    assert report["domains"][0]["domain"] == "text"


def test_many_files_behind_one_option_are_one_text(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ("--k", 8, "--sequences", 1, "--length", 80, "--json", tmp_path / "report.json")
    code, _, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", folder / "code.txt", *options))
    assert code == 0, err
    assert [text["name"] for text in read(tmp_path / "report.json")["domains"][0]["text"]] == ["prose.txt", "code.txt"]


def test_tasks(run: Run, folder: Path, tmp_path: Path) -> None:
    options = (
        "--tasks",
        "needle,key-value,human-eval",
        "--mode",
        "values,shadow",
        "--limit",
        1,
        "--allow-code-execution",
        "--text",
    )
    sizes = ("--k", "8", "--lengths", "500", "--depths", "0,100", "--samples", 1, "--json", tmp_path / "report.json")
    sizes += ("--plots", tmp_path / "plots")
    code, out, err = run(*on(folder, "tasks", *options, folder / "prose.txt", *sizes))
    assert code == 0, err
    report = read(tmp_path / "report.json")
    assert {task["task"]: len(task["questions"]) for task in report["tasks"]} == {
        "needle": 2,
        "key-value": 2,
        "human-eval": 1,
    }
    assert "top-theta k:8 sdc+vmc" in out
    assert "shadow floor:3 candidates+vmc" in out
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"recall-needle.png", "recall-key-value.png"}
    assert (report["phase"], report["setup"]["model"]) == ("decode", "tiny")


def test_endpoint(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = FakeServer(key="sesame")
    sparse = FakeServer(key="sesame", forgets_beyond=2000, counts_rows=True)
    monkeypatch.setenv("SERVER_KEY", "sesame")
    with dense.listening() as dense_url, sparse.listening() as sparse_url:
        code, out, err = run(
            *("endpoint", "--dense", dense_url, "--sparse", f"{sparse_url}/v1", "--api-key-env", "SERVER_KEY"),
            *("--text", folder / "prose.txt", "--lengths", "300,700", "--depths", "50", "--samples", 2),
            *("--json", tmp_path / "report.json"),
        )
    assert code == 0, err
    report = read(tmp_path / "report.json")
    assert report["setup"]["value_rows_share"] == 0.1
    needle = next(task for task in report["tasks"] if task["task"] == "needle")
    assert needle["contenders"][0]["shares"]["difference"] == -0.5
    assert needle["contenders"][0]["places"][0]["name"] == "length 700"
    assert "the sparse server read 10.0% of value rows" in out
    assert "sesame" not in out + err + (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "perplexity"), "--tasks: servers compute log probabilities of prompts in prefill"),
        (("--tasks", "riddle"), "unknown task 'riddle'"),
        (("--tasks", "needle"), "--text: needle needs text"),
        (("--tasks", "human-eval"), "--allow-code-execution: human-eval runs programs"),
    ],
)
def test_tasks_that_an_endpoint_cannot_answer(run: Run, arguments: tuple[str, ...], message: str) -> None:
    with FakeServer().listening() as url:
        code, out, err = run("endpoint", "--dense", url, "--sparse", url, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_server_that_is_not_there(run: Run) -> None:
    with FakeServer().listening() as url:
        pass
    code, out, err = run("endpoint", "--dense", url, "--sparse", url, "--tasks", "human-eval", "--allow-code-execution")
    assert (code, out) == (2, "")
    assert f"error: {url}: no answer" in err


def test_stores_need_names_of_their_own(run: Run, folder: Path) -> None:
    store = folder / "org--tiny-model"
    code, _, err = run(*on(folder, "perplexity", "--thresholds", store, "--text", folder / "prose.txt"))
    assert code == 2
    assert "--thresholds: 2 stores with one name" in err


def test_missing_extras_are_named(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_toptheta.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    code, _, err = run(*on(folder, "perplexity", "--text", folder / "prose.txt", "--plots", folder))
    assert code == 2
    assert "--plots: matplotlib.axes is not installed" in err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("lm-eval", "--task", "gsm8k", "--dense", "http://a", "--sparse", "http://b")
    assert code == 2
    assert 'pip install "lm-eval[api]"' in err


def test_relative_thresholds_are_the_default_and_need_no_store(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPTHETA_THRESHOLDS", str(tmp_path / "there-is-none"))
    model = (folder / "tiny", "--text", folder / "prose.txt", "--device", "cpu")
    sizes = ("--sequences", 1, "--length", 200, "--json", tmp_path / "report.json")
    code, _, err = run("perplexity", *model, *sizes, "--top-k", "16")
    assert code == 0, err
    report = read(tmp_path / "report.json")
    targets = {comparison["variant"]["target"] for comparison in report["domains"][0]["comparisons"]}
    assert (targets, report["setup"]["stores"]) == ({"floor:2", "k:16"}, [])
    code, _, err = run("perplexity", *model, *sizes, "--targets", "floor:3,k:64")
    assert code == 2
    assert "there-is-none" in err
    questions = ("--tasks", "needle", "--lengths", 300, "--depths", 0, "--samples", 1)
    code, out, err = run("tasks", *model, *questions)
    assert code == 0, err
    assert "top-theta floor:2 sdc+vmc" in out


def test_decode(run: Run, folder: Path, tmp_path: Path) -> None:
    arguments = (
        *("decode", folder / "tiny", "--device", "cpu", "--text", folder / "prose.txt", folder / "code.txt"),
        *("--lengths", "200,260", "--window", 32, "--sequences", 1, "--weight-floor", "1.5,3", "--equal-rows", "3"),
        *("--heavy", "0.01,0.05"),
        *("--top-k", 16, "--thresholds", folder / "org--tiny-model", "--targets", "k:8", "--output", tmp_path / "out"),
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    report = read(tmp_path / "out" / "report.json")
    for length in report["lengths"]:
        variants = [one["variant"] for one in length["comparisons"]]
        assert [(variant["method"], variant["dense_layers"]) for variant in variants] == [
            *[("top_theta", None)] * 3,
            *[("tiers", None)] * 4,
            *[("top_k", [])] * 2,
        ]
        assert [variant["target"] for variant in variants[:3]] == ["floor:1.5", "floor:3", "k:8"]
        assert [(variant["target"], variant["heavy"]) for variant in variants[3:8]] == [
            *(("floor:1.5", heavy) for heavy in (0.01, 0.05)),
            *(("floor:3", heavy) for heavy in (0.01, 0.05)),
            ("k:16", None),
        ]
        assert all(variant["target"] in out for variant in variants)
    before = (tmp_path / "out" / "report.json").read_bytes()
    assert run(*arguments)[:2] == (0, out)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    code, out, err = run(*arguments, "--seed", 1)
    assert (code, out) == (2, "")
    assert "output: the folder holds an evaluation with other seed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weight-floor", "many"), "--weight-floor: not numbers: 'many'. Write them as 1.5,3,6"),
        (("--weight-floor", "inf"), "--weight-floor: no weight floor: inf"),
        (("--weight-floor=-1",), "--weight-floor: no weight floor: -1"),
        (("--heavy", "some"), "--heavy: not numbers: 'some'"),
        (("--heavy", "1.5"), "heavy: no weight of heavy keys: 1.5"),
        (("--heavy", "0.1", "--weight-floor", "2,0"), "heavy: tiers need a weight floor above 0"),
        (("--lengths", "2k"), "--lengths: not whole numbers: '2k'"),
        (("--lengths", "4096"), "lengths: 4096 tokens are more than the 1024 positions"),
        (("--lengths", "200", "--top-k", "0"), "top_k: no number of keys: 0"),
        (
            ("--lengths", "200"),
            "keeps every key of rows of up to 144, and the window of a sequence of 200 begins after 72",
        ),
        (("--lengths", "400", "--sequences", "100"), "the texts have"),
    ],
)
def test_decode_refuses(run: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("decode", folder / "tiny", "--device", "cpu", "--text", folder / "prose.txt", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
