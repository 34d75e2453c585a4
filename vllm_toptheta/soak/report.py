"""What a soak found, and whether it is what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from vllm_toptheta.soak.client import Outcome
from vllm_toptheta.soak.memory import Memory
from vllm_toptheta.soak.texts import Texts

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_DETAILS = 5


class SoakConfig(BaseModel):
    """What a soak does."""

    requests: int = Field(default=500, ge=1, description="Requests at least.")
    concurrency: int = Field(default=500, ge=1, description="Requests in flight at a time.")
    seconds: float = Field(default=600.0, ge=0, description="How long the load lasts at least.")
    warm_up: float = Field(
        default=0.25, ge=0, lt=1, description="Share of the load's time that memory is not looked at."
    )
    prompts: int = Field(default=40, ge=2, description="Different prompts.")
    longest: int = Field(
        default=3000, ge=16, description="Tokens of the longest prompt; less if the server takes less."
    )
    max_tokens: int = Field(default=48, ge=2, description="Tokens of the longest answer.")
    choices: list[str] = Field(
        default=["dense"], description="What prompts ask for in vllm_xargs.toptheta, in turn after one without."
    )
    seed: int = 0
    rounding: float = Field(default=5e-3, gt=0, description="Nats between two candidates that count as equally likely.")
    max_growth: float = Field(default=2.0, gt=0, description="MiB per minute that all processes together may grow by.")
    restart: bool = Field(default=True, description="Stop the server by SIGTERM under load, and start it again.")
    keep_asking: bool = Field(
        default=False, description="Make requests of a server that is being stopped, as a load balancer does not."
    )
    kill: Literal["none", "EngineCore", "Worker"] = Field(
        "none", description="Process to SIGKILL under load, in the end."
    )
    disturbed: int = Field(default=16, ge=1, description="Requests in flight when the server is stopped or killed.")
    patience: float = Field(default=120.0, gt=0, description="Seconds within which a stopped or killed server ends.")


class Endings(BaseModel):
    """How requests ended."""

    finished: int = 0
    left: int = Field(default=0, description="The client went away on purpose.")
    error: int = Field(default=0, description="The server said that it will not answer.")
    closed: int = Field(default=0, description="The connection was refused or closed.")
    broken: int = Field(
        default=0, description="None of that: an answer without an end, an error that is no JSON, silence."
    )
    details: list[str] = Field(default_factory=list, description="What was said, the most frequent first.")

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Endings:
        """Count them."""
        found = list(outcomes)
        counts: Counter[str] = Counter(outcome.ending for outcome in found)
        details = Counter(f"{outcome.ending}: {outcome.detail}" for outcome in found if outcome.detail)
        shown = [text for text, _ in details.most_common(_SHOWN_DETAILS)]
        return cls.model_validate({**counts, "details": shown})

    @property
    def total(self) -> int:
        """All of them."""
        return self.finished + self.left + self.error + self.closed + self.broken


class Load(BaseModel):
    """The steady load."""

    seconds: float
    endings: Endings
    preemptions: int | None = Field(description="Sequences that were preempted; null if the server does not say.")
    held: dict[str, float] = Field(description="What was still running, waiting or cached when nobody asked any more.")


class Stop(BaseModel):
    """A server that was stopped by SIGTERM, or lost a process by SIGKILL, under load."""

    signal: str
    seconds: float = Field(description="Until the first process had ended.")
    exit_code: int | None = Field(description="Of the first process, negative for a signal; null if it did not end.")
    orphans: int = Field(description="Processes that outlived the first one.")
    in_flight: Endings = Field(description="Requests that were in flight at that moment.")
    later: Endings = Field(description="Requests made after that, before the server answered again or had ended.")
    after: Endings | None = Field(default=None, description="Requests made after the restart.")


class SoakReport(BaseModel):
    """A soak of one server."""

    config: SoakConfig
    device: str
    command: str = Field(description="That of the server, paths left out; its URL if it was there already.")
    versions: dict[str, str]
    environment: dict[str, str] = Field(
        description="Variables that the server inherited and its speed or memory depends on, paths left out."
    )
    prompt_tokens: tuple[int, int] = Field(description="Of the shortest and of the longest prompt.")
    load: Load
    texts: dict[str, Texts] = Field(description="By what was asked for; `AS_SERVED` where nothing was.")
    memory: Memory | None = Field(description="Null for a server that was there already, or too short a time.")
    stops: list[Stop]

    def failures(self) -> list[str]:
        """Whatever is not as it must be; empty if all is."""
        found = [f"under load: {text}" for text in _unclean(self.load.endings, may_fail=False)]
        found += [f"{name} stays at {value:g}" for name, value in self.load.held.items() if value]
        for choice, texts in self.texts.items():
            if texts.different:
                found.append(
                    f"{choice}: {len(texts.different)} texts differ from the quiet server's: {texts.different[0]}"
                )
        if self.memory is not None and self.memory.processes[-1].mib_per_minute > self.config.max_growth:
            found.append(f"memory grows by {self.memory.processes[-1].mib_per_minute:.2f} MiB per minute")
        for stop in self.stops:
            found += [f"{stop.signal}: {text}" for text in _wrong(stop)]
        return found


def _unclean(endings: Endings, *, may_fail: bool) -> list[str]:
    counts = {"broken": endings.broken} | ({} if may_fail else {"error": endings.error, "closed": endings.closed})
    if not any(counts.values()):
        return []
    return [f"{', '.join(f'{count} {name}' for name, count in counts.items() if count)}: {endings.details}"]


def _wrong(stop: Stop) -> list[str]:
    found = _unclean(stop.in_flight, may_fail=True) + _unclean(stop.later, may_fail=True)
    if stop.after is not None:
        found += _unclean(stop.after, may_fail=False)
    if stop.exit_code is None:
        found.append("the server did not end")
    elif stop.signal != "SIGTERM" and stop.exit_code == 0:
        found.append("the server ended with exit code 0")
    if stop.orphans:
        found.append(f"{stop.orphans} processes outlived the server")
    return found


def soak_table(report: SoakReport) -> Table:
    """The report as a table."""
    from rich.table import Table

    load, config = report.load, report.config
    table = Table(
        title=f"{load.endings.total} requests of {report.prompt_tokens[0]} to {report.prompt_tokens[1]} tokens, "
        f"{config.concurrency} at a time, {load.seconds:.0f} s",
        caption=f"{report.device}; " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )
    for heading in ("", "finished", "left", "error", "closed", "broken", ""):
        table.add_column(heading, justify="right" if heading else "left")
    preemptions = "unknown" if load.preemptions is None else str(load.preemptions)
    _add_endings(table, "under load", load.endings, f"preemptions: {preemptions}")
    for stop in report.stops:
        code = f"exit code {stop.exit_code} after {stop.seconds:.1f} s"
        _add_endings(table, f"{stop.signal}: in flight", stop.in_flight, code)
        _add_endings(table, "    asked later", stop.later, "")
        if stop.after is not None:
            _add_endings(table, "    after the restart", stop.after, "")
    table.add_section()
    for choice, texts in report.texts.items():
        share = (
            f"{texts.equal} of {texts.compared} equal, {texts.near_ties} near ties, {len(texts.different)} different"
        )
        table.add_row(f"texts {choice}, as of a quiet server", *[""] * 5, share)
    for process in report.memory.processes if report.memory else []:
        growth = f"{process.first_mib:.0f} to {process.last_mib:.0f} MiB, {process.mib_per_minute:+.2f} MiB per minute"
        table.add_row(f"memory of {process.name}", *[""] * 5, growth)
    table.add_row("verdict", *[""] * 5, "\n".join(report.failures()) or "passed")
    return table


def _add_endings(table: Table, name: str, endings: Endings, remark: str) -> None:
    counts = (endings.finished, endings.left, endings.error, endings.closed, endings.broken)
    table.add_row(name, *map(str, counts), remark)
