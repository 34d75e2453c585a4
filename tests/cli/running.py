"""Runs the command in this process, as a user types it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from vllm_toptheta import cli

Run = Callable[..., tuple[int, str, str]]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Run:
    """What runs `toptheta` with these words and further ones; it returns exit code, stdout and stderr.

    Tables are as wide as they like.
    """
    monkeypatch.setenv("COLUMNS", "250")

    def run(*further: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["toptheta", *map(str, (*words, *further))])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run
