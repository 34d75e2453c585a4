"""A plugin of pytest for runs in Triton's interpreter: what is skipped there without being named here fails.

    TRITON_INTERPRET=1 python -m pytest -p tests.interpreter FILE...

Triton must be told before it is imported, and whoever imports vLLM imports it; hence a run of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
EXPECTED_SKIPS = {
    "Triton's interpreter multiplies the bits of bfloat16 as integers",  # these tests run on a GPU
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _checked(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _checked(report)


def _checked(report: Report) -> Report:
    """The same report, of a failure where nobody expects that the test is skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if reason not in EXPECTED_SKIPS:
            report.outcome = "failed"
            report.longrepr = f"skipped, which tests/interpreter.py does not expect: {reason}"
    return report
