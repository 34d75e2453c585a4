"""The order of a soak: a quiet server, a steady load, a stop and a start under load, a death under load."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_toptheta.errors import SoakError
from vllm_toptheta.soak.client import HELD, PREEMPTIONS, Outcome, SoakClient
from vllm_toptheta.soak.load import Crowd
from vllm_toptheta.soak.memory import MemoryWatch
from vllm_toptheta.soak.report import Endings, Load, SoakConfig, SoakReport, Stop
from vllm_toptheta.soak.server import ServerProcess
from vllm_toptheta.soak.texts import compare_by_choice
from vllm_toptheta.soak.traffic import Behaviour, Prompt, make_prompts, sample_text

_SETTLING_SECONDS = 60.0  # within which a server that nobody asks has let go of everything
_SETTINGS = ("LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "ONEDNN_", "TOPTHETA_", "VLLM_CPU_")
_UNDER_WAY_SECONDS = 3.0  # that requests have been in flight before the server is stopped
_PRE_STOP_SECONDS = 2.0  # at least between the last request and SIGTERM
_FOLLOWING_SECONDS = 10.0  # within which the other processes have to follow the first one

Progress = Callable[[str], None]


def soak(
    config: SoakConfig,
    url: str,
    command: Sequence[str],
    *,
    log: Path,
    api_key: str | None = None,
    report_progress: Progress = lambda line: None,
) -> SoakReport:
    """Soak a server.

    Args:
        config: What is done.
        url: Where the server answers.
        command: What starts it, run here; empty for a server that is up already, which is neither measured nor stopped.
        log: What the server prints goes here.
        api_key: The server's, if it asks for one.
        report_progress: Called with a line for each step.

    Raises:
        SoakError: The server does not start, does not answer, or cannot be asked for what is needed.
    """
    return asyncio.run(_soak(config, url, command, log, api_key, report_progress))


async def _soak(
    config: SoakConfig, url: str, command: Sequence[str], log: Path, api_key: str | None, report_progress: Progress
) -> SoakReport:
    client = SoakClient(url, api_key=api_key)
    server = ServerProcess(command, log, client.is_healthy) if command else None
    try:
        if server:
            report_progress("starting the server")
            await server.start()
        await client.introduce()
        prompts = await _prompts(config, client)
        report_progress(f"quiet: {len(prompts)} prompts, one at a time")
        quiet = await _quiet(client, prompts)
        report_progress(f"load: {config.concurrency} requests at a time")
        watch = MemoryWatch(server) if server else None
        load, outcomes, steady_since = await _load(config, client, prompts, watch)
        stops = []
        if server and config.restart:
            report_progress("SIGTERM under load, and a start")
            stops.append(await _restart(config, client, server, prompts, outcomes))
        if server and config.kill != "none":
            report_progress(f"SIGKILL of {config.kill} under load")
            stops.append(await _kill(config, client, server, prompts, outcomes))
        return SoakReport(
            config=config,
            device=_device(),
            command=shlex.join(Path(word).name if word.startswith("/") else word for word in command) or client.url,
            versions=_versions(),
            environment=server_environment() if command else {},
            prompt_tokens=(len(prompts[0].token_ids), len(prompts[-1].token_ids)),
            load=load,
            texts=compare_by_choice(outcomes, quiet, config.rounding),
            memory=watch.since(steady_since) if watch else None,
            stops=stops,
        )
    finally:
        await client.close()
        if server:
            await server.clean_up()


async def _prompts(config: SoakConfig, client: SoakClient) -> list[Prompt]:
    token_ids = await client.tokenize(sample_text())
    longest = min(config.longest, client.max_model_len - config.max_tokens, len(token_ids))
    if longest < config.max_tokens:
        raise SoakError(
            f"sequences of at most {client.max_model_len} tokens are too short for answers of {config.max_tokens}",
            field="--max-tokens",
            remedy="Ask for fewer",
        )
    return make_prompts(
        token_ids,
        count=config.prompts,
        longest=longest,
        max_tokens=config.max_tokens,
        seed=config.seed,
        choices=config.choices,
    )


async def _quiet(client: SoakClient, prompts: Sequence[Prompt]) -> dict[int, Outcome]:
    quiet = {}
    for prompt in prompts:
        outcome = quiet[prompt.index] = await client.ask(prompt, Behaviour.WHOLE, 0.0)
        if outcome.ending != "finished":
            raise SoakError(f"a quiet server did not answer: {outcome.detail}", field=client.url)
    return quiet


async def _load(
    config: SoakConfig, client: SoakClient, prompts: Sequence[Prompt], watch: MemoryWatch | None
) -> tuple[Load, list[Outcome], float]:
    """The steady load, its outcomes, and when the server was warm, a time of the monotonic clock."""
    before = await client.counters()
    start = time.monotonic()
    crowd = Crowd(client, prompts, size=config.concurrency, seed=config.seed)
    sampling = asyncio.create_task(watch.run()) if watch else None
    while len(crowd.outcomes) + config.concurrency < config.requests or time.monotonic() - start < config.seconds:
        await asyncio.sleep(0.2)
    seconds = time.monotonic() - start
    # while the last requests end there are fewer and fewer: that is no steady load any more
    if sampling:
        sampling.cancel()
    outcomes = await crowd.leave()
    load = Load(
        seconds=seconds,
        endings=Endings.of(outcomes),
        preemptions=None,
        held=await _held(client),
    )
    after = await client.counters()
    if PREEMPTIONS in after:
        load.preemptions = int(after[PREEMPTIONS] - before.get(PREEMPTIONS, 0))
    return load, list(outcomes), start + config.warm_up * seconds


async def _held(client: SoakClient) -> dict[str, float]:
    """What the server still holds once it has had time to let go."""
    deadline = time.monotonic() + _SETTLING_SECONDS
    while True:
        counters = await client.counters()
        held = {name: counters[name] for name in HELD if name in counters}
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        await asyncio.sleep(0.5)


async def _restart(
    config: SoakConfig, client: SoakClient, server: ServerProcess, prompts: Sequence[Prompt], outcomes: list[Outcome]
) -> Stop:
    crowd = await _under_way(config, client, prompts)
    if not config.keep_asking:
        # as a load balancer does before it has a server stopped
        crowd.pause()
        await _taken_in(client, crowd)
    begin = time.monotonic()
    server.terminate()
    code = await server.ended(config.patience)
    end = time.monotonic()
    orphans = await server.clean_up(_FOLLOWING_SECONDS)
    await server.start()
    again = time.monotonic()
    crowd.resume()
    # everyone has to be answered once more
    while not all(any(one.began > again for one in mine) for mine in crowd.by_client):
        await asyncio.sleep(0.2)
    found = await crowd.leave()
    outcomes += found
    return Stop(
        signal="SIGTERM",
        seconds=end - begin,
        exit_code=code,
        orphans=orphans,
        in_flight=Endings.of(one for one in found if one.began <= begin < one.ended),
        later=Endings.of(one for one in found if begin < one.began <= again),
        after=Endings.of(one for one in found if one.began > again),
    )


async def _taken_in(client: SoakClient, crowd: Crowd) -> None:
    """Wait until the engine has taken in all requests: what it finds in its queue after SIGTERM, it rejects."""
    await asyncio.sleep(_PRE_STOP_SECONDS)
    deadline = time.monotonic() + _SETTLING_SECONDS
    while time.monotonic() < deadline:
        counters = await client.counters()
        if sum(counters.get(name, 0) for name in HELD[:2]) >= crowd.in_flight:
            return
        await asyncio.sleep(0.2)


async def _kill(
    config: SoakConfig, client: SoakClient, server: ServerProcess, prompts: Sequence[Prompt], outcomes: list[Outcome]
) -> Stop:
    crowd = await _under_way(config, client, prompts)
    begin = time.monotonic()
    server.kill(config.kill)
    code = await server.ended(config.patience)
    end = time.monotonic()
    orphans = await server.clean_up(_FOLLOWING_SECONDS)
    found = await crowd.leave()
    outcomes += found
    return Stop(
        signal=f"SIGKILL of {config.kill}",
        seconds=end - begin,
        exit_code=code,
        orphans=orphans,
        in_flight=Endings.of(one for one in found if one.began <= begin < one.ended),
        later=Endings.of(one for one in found if one.began > begin),
    )


async def _under_way(config: SoakConfig, client: SoakClient, prompts: Sequence[Prompt]) -> Crowd:
    crowd = Crowd(client, prompts, size=config.disturbed, seed=config.seed + 1)
    await asyncio.sleep(_UNDER_WAY_SECONDS)
    return crowd


def server_environment() -> dict[str, str]:
    """Variables that the server inherits and its speed or memory depends on."""
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)}
    return {name: Path(value).name if value.startswith("/") else value for name, value in settings.items()}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("vllm-toptheta", "vllm", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device() -> str:
    names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else 'unknown processor'}, {len(names)} cores"
