"""The benchmark of decoding on CPUs: what it times, not how fast that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_toptheta.benchmarks import cpu_kernels
from vllm_toptheta.benchmarks.kernels import KernelReport, KernelWorkload
from vllm_toptheta.cli.main import app
from vllm_toptheta.errors import BenchmarkError

WORKLOAD = KernelWorkload(specs=[], num_heads=6, num_kv_heads=2, head_size=64, block_size=16)


@pytest.mark.parametrize("query_len", [1, 4])
def test_both_answer_the_same_where_every_key_survives(query_len: int) -> None:
    kept = [torch.ones(2, 3, n, dtype=torch.bool) for n in (300, 170)]
    step = cpu_kernels.CpuStep.of(WORKLOAD, [300, 170], kept, query_len)
    ours, dense = cpu_kernels.toptheta(step)[0]().float(), cpu_kernels.cpu_attn(step)().float()
    assert float(dense.abs().max()) > 0.1
    assert len(ours) == 2 * query_len
    torch.testing.assert_close(ours, dense, rtol=2e-2, atol=2e-3)


def test_survivors_are_those_of_the_pattern() -> None:
    kept = torch.zeros(2, 3, 400, dtype=torch.bool)
    kept[0, 0, 100:130] = kept[0, 1, 120:140] = True
    _, share = cpu_kernels.toptheta(cpu_kernels.CpuStep.of(WORKLOAD, [400], [kept]))
    # 40 rows of the first kv head, and the last token of each
    assert share == pytest.approx((41 + 1) / 800)
    _, of_two = cpu_kernels.toptheta(cpu_kernels.CpuStep.of(WORKLOAD, [400], [kept], query_len=2))
    # for the first of the two a page of 15 tokens is open, for the second none
    assert of_two == pytest.approx((40 + 15 + 15 + 42 + 2) / (2 * (399 + 400)))


def test_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "STEPS_BYTES", 1 << 20)
    arguments = ["bench", "kernels", "--device", "cpu", "--specs", "1q1s600,1q1s20k", "--shape", "6,2,64"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    report = KernelReport.model_validate(json.loads((tmp_path / "report.json").read_text()))
    short, long = (
        {time.kernel.split(", even")[0]: time for time in batch.kernels} for batch in report.batches
    )  # fmt: skip
    assert short["CPU_ATTN"].ratio == 1
    # what is too short to gain is served dense
    assert short["Top-Theta"].rows_read_share == 1 > long["Top-Theta"].rows_read_share
    assert long["Top-Theta"].rows_read_share == long["Top-Theta, thresholds at any length"].rows_read_share < 0.1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--shape", "5,2,64"], "--shape"),
        (["--shape", "6,2,40"], "--shape, --block-size"),
        (["--shape", "6,2,64", "--block-size", "20"], "--shape, --block-size"),
        (["--shape", "6,2,64", "--heavy-share", "0.1"], "--heavy-share"),
    ],
)
def test_what_a_cpu_has_not_is_refused(arguments: list[str], field: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", *arguments])
    assert isinstance(done.exception, BenchmarkError)
    assert done.exception.field == field
